"""One rank's part of a run, from joining the others to the end."""

from __future__ import annotations

import contextlib
import logging
import warnings
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist

from pipekit.config import Config
from pipekit.distributed.processes import join_processes, leave_processes, raise_together
from pipekit.distributed.unit_check import check_unit
from pipekit.errors import ConfigError
from pipekit.plan.choose import load_trial, plan_trial, resumable
from pipekit.plan.plan import Plan
from pipekit.plan.run_folder import RunFolder, find_start, write_config
from pipekit.schedules import write_csv
from pipekit.training.callbacks import Callback, MetricsFile, RunResult
from pipekit.training.console import ConsoleProgress, chatter_to, make_console, show_plan
from pipekit.training.context import TrialContext
from pipekit.training.loggers import TensorBoardLogger, WandbLogger
from pipekit.training.trainer import Trainer


def run_rank(
    config: Config,
    *,
    rank: int,
    local_rank: int,
    world_size: int,
    num_devices: int | None,
    num_threads: int,
    plan_shown: bool,
) -> RunResult:
    """Train as one rank of a run; the environment says how to find the others.

    Args:
        config: the configuration.
        rank: global rank.
        local_rank: rank among the processes of this machine.
        world_size: number of processes.
        num_devices: GPUs of this machine; None where there are none.
        num_threads: CPU threads of this process.
        plan_shown: whether the user has already seen the table of the run.

    Raises:
        PipekitError: if the run cannot be started, or cannot go on.
    """
    torch.set_num_threads(num_threads)
    folder = RunFolder(Path(config.run.dir))
    with chatter_to(folder.logs / f"rank-{rank}.log") as terminal:
        logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
        warnings.simplefilter("default")
        # Layers are timed once, and all ranks take the stages that follow.
        plan = plan_trial(
            config, world_size=world_size, num_devices=num_devices, measure=rank == 0, num_threads=num_threads
        )
        start = find_start(config)
        device = join_processes(device=plan.device, timeout_s=config.run.timeout_s, local_rank=local_rank)
        if config.parallel.partition == "profile":
            plan = replace(plan, boundaries=_boundaries_of_first_rank(plan))
        trial = load_trial(config)
        unit = trial.build_unit(plan.layout, placement=plan.placement, timeout_s=config.run.timeout_s)
        check_unit(unit, layout=plan.layout, placement=plan.placement)
        context = TrialContext(plan, unit, device, folder, start)
        console = make_console(terminal)
        error: Exception | None = None
        callbacks: list[Callback] = []
        if unit.should_report_metrics:
            try:
                write_config(folder, resumable(plan.config))
                if plan.layout.pp > 1:
                    write_csv(plan.schedule, folder.schedule)
                callbacks = _build_callbacks(plan.config)
            except (OSError, ConfigError) as failure:
                error = failure
            if not plan_shown:
                show_plan(plan, console)
            callbacks.append(ConsoleProgress(console, interval=config.logging.interval))
        raise_together(error)
        trainer = Trainer(trial(context), callbacks)
        result = trainer.fit()
        with contextlib.suppress(RuntimeError):
            leave_processes()
        return result


def _boundaries_of_first_rank(plan: Plan) -> list[int]:
    told = [list(plan.boundaries)]
    dist.broadcast_object_list(told, src=0)
    return told[0]


def _build_callbacks(config: Config) -> list[Callback]:
    callbacks: list[Callback] = [MetricsFile()]
    if config.logging.tensorboard:
        callbacks.append(TensorBoardLogger())
    if config.logging.wandb is not None:
        callbacks.append(WandbLogger(config.logging.wandb))
    return callbacks
