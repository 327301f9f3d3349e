"""`pipekit train`: start the ranks of a run on this machine, or join those that another launcher has started."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from pipekit.config import Config, load_config
from pipekit.launch.environment import RankEnvironment, detect_ranks
from pipekit.launch.extensions import extensions_dir, guard_extension_builds
from pipekit.launch.local import run_local
from pipekit.launch.resources import num_accelerators, num_usable_cpus, thread_environ, threads_per_process
from pipekit.launch.worker import error_file_from, report_failure, tie_to_parent


def train(path: str | Path, overrides: Sequence[str] = ()) -> None:
    """Train the configuration at `path`.

    On its own, this plans the run, shows the plan, starts a process for each rank and watches over them. Under
    torchrun, deepspeed, srun or mpirun, this process is one of the ranks.

    Raises:
        PipekitError: if the configuration is wrong, or a rank fails.
    """
    ranks = detect_ranks(os.environ)
    if ranks is not None:
        with report_failure(error_file_from(os.environ)):
            join(load_config(path, overrides), ranks, plan_shown=False)
        return
    start(load_config(path, overrides))


def start(config: Config) -> None:
    """Plan a run, show the plan, and run its ranks as processes on this machine."""
    # Whatever can be refused without torch is refused before it is imported.
    from pipekit.config import plan_batch, resolve_layout
    from pipekit.plan.run_folder import RunFolder, find_start

    num_devices = None if config.run.device == "cpu" else num_accelerators(os.environ)
    num_threads = None
    if not config.parallel.auto:
        layout = resolve_layout(config, num_devices=num_devices)
        plan_batch(config, layout.dp)
        num_threads = threads_per_process(config.run.threads_per_process, layout.world_size, num_usable_cpus())
    checkpoint = find_start(config)
    step = _step_of(checkpoint)
    from pipekit.training.console import make_console, show_plan

    console = make_console()
    if step >= config.train.steps:
        console.print(
            f"{config.run.dir} has trained {step} of {config.train.steps} steps already; set train.steps "
            f"higher to go on, or run.dir to start another run"
        )
        return
    from pipekit.plan.choose import plan_trial, resumable
    from pipekit.plan.run_folder import write_config

    plan = plan_trial(
        config,
        world_size=None,
        num_devices=num_devices,
        on_progress=_Progress(console),
        num_threads=num_threads,
        num_cpus=num_usable_cpus(),
    )
    show_plan(plan, console, start_step=step)
    folder = RunFolder(Path(config.run.dir))
    write_config(folder, resumable(plan.config))
    world_size = plan.layout.world_size
    environ = thread_environ(config.run.threads_per_process, world_size, os.environ)
    environ["TORCH_EXTENSIONS_DIR"] = str(extensions_dir(os.environ))
    if plan.device == "cpu":
        environ["DS_ACCELERATOR"] = "cpu"
    _guard_builds({**os.environ, **environ})
    resume = [] if checkpoint is None else [f"checkpoint.resume={checkpoint}"]
    console.print(f"starting {world_size} {'process' if world_size == 1 else 'processes'} ...")
    run_local(
        [sys.executable, "-m", "pipekit.commands.rank", str(folder.config), *resume],
        world_size=world_size,
        log_dir=folder.logs,
        env=environ,
    )


def join(config: Config, ranks: RankEnvironment, *, plan_shown: bool) -> None:
    """Be one rank of a run that a launcher has started."""
    local_world_size = ranks.local_world_size or ranks.world_size
    os.environ.update(ranks.as_environ())
    os.environ["TORCH_EXTENSIONS_DIR"] = str(extensions_dir(os.environ))
    if ranks.local_rank == 0 and ranks.launcher != "pipekit":
        _guard_builds(os.environ)
    os.environ.update(thread_environ(config.run.threads_per_process, local_world_size, os.environ))
    num_devices = None if config.run.device == "cpu" else num_accelerators(os.environ)
    if not num_devices:
        os.environ["DS_ACCELERATOR"] = "cpu"
    from pipekit.training.run import run_rank

    run_rank(
        config,
        rank=ranks.rank,
        local_rank=ranks.local_rank,
        world_size=ranks.world_size,
        num_devices=num_devices,
        num_threads=threads_per_process(config.run.threads_per_process, local_world_size, num_usable_cpus()),
        plan_shown=plan_shown,
    )


def rank_main(arguments: list[str]) -> None:
    """Run one rank that `start` has started: the configuration's path, then overrides."""
    tie_to_parent(os.environ)
    with report_failure(error_file_from(os.environ)):
        ranks = detect_ranks(os.environ)
        assert ranks is not None, "pipekit.commands.rank is started by pipekit train"
        join(load_config(arguments[0], arguments[1:]), ranks, plan_shown=True)


def _guard_builds(environ: Mapping[str, str]) -> None:
    for note in guard_extension_builds(environ):
        sys.stderr.write(f"{note}\n")


class _Progress:
    """Shows what is done before training, one line each."""

    def __init__(self, console: object) -> None:
        self._console = console
        self._last = ""

    def __call__(self, message: str, fraction: float | None) -> None:
        if message != self._last:
            self._last = message
            self._console.print(f"{message} ...")  # type: ignore[attr-defined]


def _step_of(checkpoint: Path | None) -> int:
    if checkpoint is None:
        return 0
    from pipekit.checkpoint.manifest import load_manifest

    return load_manifest(checkpoint).training.step
