"""`pipekit train`: start the ranks of a run on this machine, or become one of those that another launcher started."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pipekit.commands.shared_options import ConfigFile, Overrides, TrustCode
from pipekit.launch.compiler import compiler_environ
from pipekit.launch.environment import RankEnvironment, detect_ranks
from pipekit.launch.extensions import extensions_dir, guard_extension_builds
from pipekit.launch.gpu_environment import gpu_environ
from pipekit.launch.local import count_processes, run_plan
from pipekit.launch.network import gloo_environ
from pipekit.launch.resources import check_degrees, check_process_count, find_resources, processes_text, thread_environ
from pipekit.launch.restarts import start_until_done, warn_of_restarts
from pipekit.launch.trial import train_trial
from pipekit.launch.worker import end_finished, error_file_from, report_failure, started_s
from pipekit.plan.resources import Resources
from pipekit.run_lock import hold_run
from pipekit.signals import ending_at_once, noting
from pipekit.storage import check_writable

if TYPE_CHECKING:
    from rich.console import Console

    from pipekit.config import Config
    from pipekit.config.trial_config import TrialConfig
    from pipekit.plan.plan import Plan


def command(
    config: ConfigFile,
    overrides: Overrides = None,
    trust_code: TrustCode = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only check everything, prepare the data and show the plan.")
    ] = False,
) -> None:
    """Train a model, on this machine or under another launcher.

    Starts the processes of the run, unless torchrun, deepspeed, srun or mpirun has already started them.
    """
    from pipekit.config.sources import read_run_config

    if dry_run:
        rehearse(read_run_config(config, overrides or [], trust_code=trust_code))
        return
    run(lambda: read_run_config(config, overrides or [], trust_code=trust_code))


def rehearse(config: Config | TrialConfig) -> None:
    """Dry run: do everything up to the start of the processes, and write only prepared data.

    Raises:
        PipekitError: if the run would be refused.
    """
    from pipekit.config.trial_config import TrialConfig
    from pipekit.plan.run_folder import RunFolder, check_run_folder

    if isinstance(config, TrialConfig):
        from pipekit.training.trial_run import load_trial_class

        trial = load_trial_class(config)
        num_ranks, _ = count_processes(config.run.processes, config.run.device)
        check_process_count(num_ranks, "run.processes")
        check_run_folder(RunFolder(config.run.dir))
        check_writable(Path(config.run.dir), name="run.dir=")
        sys.stdout.write(f"dry run: {processes_text(num_ranks)} of {trial.__name__} would start; nothing was written\n")
        return
    from pipekit.data.prepare import DEFAULT_CACHE_DIR

    resources = find_resources(os.environ, config)
    num_ranks = check_degrees(config, world_size=resources.world_size, num_devices=resources.num_gpus)
    check_process_count(num_ranks, "parallel")
    decided = _decide(config, resources)
    if decided is None:
        return
    plan, console = decided
    cache = Path(config.data.cache_dir or DEFAULT_CACHE_DIR).expanduser()
    written = f"nothing was written but data in {cache}" if plan.prepared else "nothing was written"
    start_step = f" from step {plan.start.step}" if plan.start is not None else ""
    console.print(
        f"dry run: {processes_text(plan.layout.world_size)} would start{start_step}; {written}", soft_wrap=True
    )


def run(read: Callable[[], Config | TrialConfig]) -> Config | TrialConfig:
    """Train the configuration that `read` returns, of layers or of a trial, and return it.

    Under another launcher, this process is one of the ranks, and exits after training.

    Raises:
        PipekitError: if the configuration is wrong, or a rank fails.
    """
    from pipekit.config.trial_config import TrialConfig

    ranks = detect_ranks(os.environ)
    with nullcontext() if ranks is None else report_failure(error_file_from(os.environ)):
        config = read()
        if isinstance(config, TrialConfig):
            train_trial(config)
        elif ranks is None:
            start(config)
        else:
            join(config, ranks)
    if ranks is not None:
        end_finished()
    return config


def start(config: Config) -> None:
    """Plan a run, show the plan, and run its ranks as processes on this machine."""
    # Refuse whatever can be refused without torch before importing it.
    resources = find_resources(os.environ, config)
    num_ranks = check_degrees(config, world_size=resources.world_size, num_devices=resources.num_gpus)
    check_process_count(num_ranks, "parallel")
    from pipekit.plan.run_folder import RunFolder

    folder = RunFolder(config.run.dir)
    with hold_run(folder.path):
        start_until_done(
            partial(_start, config, resources),
            restarts=config.run.restarts,
            failures=folder.failures,
            checkpoints=folder.checkpoints,
            page=folder.report,
        )


def _start(config: Config, resources: Resources, goes_on: bool) -> None:
    from pipekit.plan.run_folder import RunFolder, describe_progress

    def describe() -> str:
        return describe_progress(config.run.dir)

    with ending_at_once(describe):
        plan = _prepare(config, resources, goes_on)
    if plan is not None:
        folder = RunFolder(plan.config.run.dir)
        with noting(describe):
            run_plan(plan, folder.plan, log_dir=folder.logs)


def _prepare(config: Config, resources: Resources, goes_on: bool) -> Plan | None:
    """Plan a run, show and write the plan; None if the run has already finished."""
    from pipekit.plan.run_folder import write_plan

    decided = _decide(config.updated({"checkpoint.resume": "auto"}) if goes_on else config, resources)
    if decided is None:
        return None
    plan, console = decided
    write_plan(plan)
    console.print(f"starting {processes_text(plan.layout.world_size)} ...")
    return plan


def _decide(config: Config, resources: Resources) -> tuple[Plan, Console] | None:
    """Plan a run, show the plan, and return it with the console; None if the run has already finished."""
    from pipekit.plan.run_folder import find_start

    start_point = find_start(config)
    check_writable(Path(config.run.dir), name="run.dir=")
    from pipekit.training.console import describe_finished, make_console, show_plan

    console = make_console()

    def tell_if_finished(config: Config) -> bool:
        if start_point is None or not config.train.has_steps or start_point.step < config.train.steps:
            return False
        console.print(describe_finished(Path(config.run.dir), start_point.step, config.train.steps))
        return True

    if tell_if_finished(config):
        return None
    from pipekit.training.prepare import prepare_run
    from pipekit.training.progress_bar import ProgressBar

    with ProgressBar(console) as report:
        plan = prepare_run(config, resources, start=start_point, on_progress=report).plan
    if not config.train.has_steps and tell_if_finished(plan.config):
        return None
    from pipekit.plan.room import check_room

    warning = check_room(plan)
    show_plan(plan, console)
    if warning is not None:
        console.print(f"warning: {warning}", style="yellow", markup=False)
    return plan, console


def join(config: Config, ranks: RankEnvironment) -> None:
    """Run one rank of a run that another launcher has started."""
    warn_of_restarts(config.run.restarts, ranks)
    local_world_size = ranks.local_world_size or ranks.world_size
    os.environ.update({**ranks.as_environ(), **gloo_environ(ranks, os.environ)})
    os.environ["TORCH_EXTENSIONS_DIR"] = str(extensions_dir(os.environ))
    if ranks.local_rank == 0:
        for note in guard_extension_builds(os.environ):
            sys.stderr.write(f"{note}\n")
    os.environ.update(thread_environ(config.run.threads_per_process, local_world_size, os.environ))
    resources = find_resources(os.environ, config, world_size=ranks.world_size, local_world_size=local_world_size)
    check_degrees(config, world_size=resources.world_size, num_devices=resources.num_gpus)
    os.environ.update(compiler_environ(config, os.environ, device="cuda" if resources.num_gpus else "cpu"))
    if not resources.num_gpus:
        os.environ["DS_ACCELERATOR"] = "cpu"
    else:
        os.environ.update(gpu_environ(Path(config.run.dir) / "logs", os.environ))
    from pipekit.plan.run_folder import describe_progress
    from pipekit.training.run import run_joining_rank

    with ending_at_once(lambda: describe_progress(config.run.dir)):
        run_joining_rank(
            config,
            resources,
            rank=ranks.rank,
            local_rank=ranks.local_rank,
            loopback_port=ranks.loopback_port,
            restarts=ranks.restarts,
            started_s=started_s(os.environ),
        )
