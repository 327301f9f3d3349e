"""Processes of a user-defined trial: started on this machine, or joined if another launcher has started them."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pipekit.launch.environment import RankEnvironment, detect_ranks
from pipekit.launch.extensions import extensions_dir, guard_extension_builds
from pipekit.launch.local import RANK_GRACE_S, run_processes
from pipekit.launch.network import gloo_environ
from pipekit.launch.resources import check_process_count, count_gpus
from pipekit.launch.restarts import start_until_done, warn_of_restarts
from pipekit.launch.worker import end_finished, error_file_from, report_failure, started_s
from pipekit.run_lock import hold_run
from pipekit.signals import ending_at_once, noting
from pipekit.storage import check_writable

if TYPE_CHECKING:
    from pipekit.config.trial_config import TrialConfig
    from pipekit.training.context import TrialContext

TRIAL_TASK = "trial"


@contextmanager
def init(
    *,
    hparams: Mapping[str, Any] | None = None,
    exp_conf: Mapping[str, Any] | None = None,
    enable_tensorboard_logging: bool = False,
) -> Iterator[TrialContext]:
    """Join the processes that this script's launcher started, and yield the trial's context.

    Under torchrun, deepspeed, srun or mpirun, this process is one of the ranks, and an error ends it at once, so the
    other ranks do not wait for it. Without a launcher it is the only process.

    Args:
        hparams: hyperparameters, in place of those in `exp_conf`.
        exp_conf: the configuration, with the keys of a YAML file.
        enable_tensorboard_logging: whether the trainer writes all metrics to TensorBoard.

    Raises:
        PipekitError: if the configuration is wrong, or the processes cannot connect to each other.

    Example:
        with pipekit.init(hparams={"lr": 0.1}) as context:
            pipekit.Trainer(MyTrial(context), context).fit(max_length=pipekit.Epoch(3))
    """
    from pipekit.config.trial_config import parse_trial_config

    ranks = detect_ranks(os.environ)
    with nullcontext() if ranks is None else report_failure(error_file_from(os.environ)):
        config = parse_trial_config({**(exp_conf or {}), **({} if hparams is None else {"hyperparameters": hparams})})
        with joined_context(config, ranks) as context:
            context.set_enable_tensorboard_logging(enable_tensorboard_logging)
            yield context


@contextmanager
def joined_context(config: TrialConfig, ranks: RankEnvironment | None) -> Iterator[TrialContext]:
    """Join the ranks, or run alone if there are none, yield the trial's context, and leave the ranks at the end."""
    device: Literal["cpu", "cuda"] = "cuda" if count_gpus(config.run.device, os.environ) else "cpu"
    if device == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"
    if ranks is not None:
        os.environ.update({**ranks.as_environ(), **gloo_environ(ranks, os.environ)})
    os.environ["TORCH_EXTENSIONS_DIR"] = str(extensions_dir(os.environ))
    if ranks is None or ranks.local_rank == 0:
        for note in guard_extension_builds(os.environ):
            sys.stderr.write(f"{note}\n")
    from pipekit.distributed.processes import join_alone, join_processes, leave_processes
    from pipekit.training.context import TrialContext

    if ranks is None:
        place, local_rank = join_alone(device=device), 0
    else:
        place = join_processes(
            device=device,
            timeout_s=config.run.timeout_s,
            local_rank=ranks.local_rank,
            loopback_port=ranks.loopback_port,
            restarts=ranks.restarts,
        )
        local_rank = ranks.local_rank
    context = TrialContext(config, place, local_rank=local_rank)
    context.started_s = started_s(os.environ)
    yield context
    del context
    leave_processes()


def train_trial(config: TrialConfig) -> None:
    """Train the trial that a configuration names: start its processes, or be one that a launcher has started.

    Raises:
        PipekitError: if the trial breaks a rule, or a rank fails.
    """
    from pipekit.plan.run_folder import describe_progress

    def describe() -> str:
        return describe_progress(config.run.dir)

    ranks = detect_ranks(os.environ)
    if ranks is not None:
        with report_failure(error_file_from(os.environ)), ending_at_once(describe):
            warn_of_restarts(config.run.restarts, ranks)
            run_trial_rank(config, ranks)
        end_finished()
    from pipekit.plan.run_folder import RunFolder, check_run_folder, write_config
    from pipekit.settings.yaml_source import write_yaml
    from pipekit.training.trial_run import load_trial_class

    with ending_at_once(describe):
        # Whatever can be refused is refused before a process is started.
        load_trial_class(config)
    check_process_count(1 if config.run.processes == "auto" else config.run.processes, "run.processes")
    folder = RunFolder(config.run.dir)

    def start(goes_on: bool) -> None:
        newest = {"fit": config.fit.model_copy(update={"latest_checkpoint": None})} if goes_on else {}
        write_config(folder, write_yaml(config.model_copy(update=newest).model_dump()))
        run_processes(
            [sys.executable, "-m", "pipekit.launch.rank", str(folder.config), TRIAL_TASK],
            processes=config.run.processes,
            device=config.run.device,
            threads=config.run.threads_per_process,
            log_dir=folder.logs,
            grace_s=RANK_GRACE_S,
            timeout_s=config.run.timeout_s,
        )

    with hold_run(folder.path), noting(describe):
        check_run_folder(folder)
        check_writable(folder.path, name="run.dir=")
        start_until_done(
            start,
            restarts=config.run.restarts,
            failures=folder.failures,
            checkpoints=folder.checkpoints,
            page=folder.report,
        )


def run_trial_rank(config: TrialConfig, ranks: RankEnvironment) -> None:
    """Train as one rank."""
    from pipekit.training.console import chatter_to
    from pipekit.training.trial_run import fit_as_configured

    log = Path(config.run.dir) / "logs" / f"rank-{ranks.rank}.log"
    with chatter_to(log) as terminal, joined_context(config, ranks) as context:
        context.terminal, context.is_watched = terminal, error_file_from(os.environ) is not None
        fit_as_configured(context)
