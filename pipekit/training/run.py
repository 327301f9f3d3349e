"""One rank's part of a run, from joining the others to the end."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Literal, TextIO

import torch

from pipekit.config import Config
from pipekit.data.tokenizer import load_tokenizer
from pipekit.distributed.first_rank import prefixed_store, tell_from_first_rank
from pipekit.distributed.host_folders import HostFolders, check_folders
from pipekit.distributed.mpu_check import check_mpu
from pipekit.distributed.processes import join_processes, leave_processes, raise_together, run_together
from pipekit.engine.gather import gather_file, gather_start
from pipekit.errors import ConfigError, DataError, PipekitError
from pipekit.hangs.heartbeat import HeartbeatThread
from pipekit.hangs.monitor import HangReporter
from pipekit.layers.specs import LayerSpec
from pipekit.plan.decide import Decision, build_trained_layers
from pipekit.plan.device import plan_device
from pipekit.plan.plan import Plan
from pipekit.plan.resources import Resources
from pipekit.plan.room import check_room
from pipekit.plan.run_folder import RunFolder, adopt_config, find_start, write_plan
from pipekit.progress import ProgressCallback
from pipekit.run_lock import hold_run
from pipekit.storage import check_writable
from pipekit.tensors.fp32_products import fp32_products
from pipekit.training.console import ConsoleProgress, chatter_to, make_console, show_plan
from pipekit.training.layers_run import LayersRun
from pipekit.training.layers_trial import LayersTrial
from pipekit.training.loggers import EventsFile, MetricsFile, WandbLogger, plan_facts
from pipekit.training.prepare import load_trial, prepare_run
from pipekit.training.run_context import RunContext
from pipekit.training.shipped.trackio import TrackioLogger
from pipekit.training.trial_callbacks import TrialCallback
from pipekit.training.trial_loop import TrialResult


def run_planned_rank(
    plan: Plan, *, rank: int, local_rank: int, started_s: float, loopback_port: int | None = None
) -> TrialResult:
    """Train as one rank of a run whose plan the user has seen.

    Args:
        plan: the plan.
        rank: the rank.
        local_rank: its number on this machine.
        started_s: when the run was started, by `time.monotonic`.
        loopback_port: see `join_processes`.

    Raises:
        PipekitError: if the run cannot be started, or cannot go on.
    """
    torch.set_num_threads(plan.num_threads)
    config = plan.config
    with (
        _own_log(config, rank=rank) as terminal,
        joined(config, plan.device, local_rank=local_rank, loopback_port=loopback_port) as device,
    ):
        return _train(start_trial(plan, device), terminal, started_s, is_watched=True)


def run_joining_rank(
    config: Config,
    resources: Resources,
    *,
    rank: int,
    local_rank: int,
    started_s: float,
    loopback_port: int | None = None,
    restarts: int = 0,
) -> TrialResult:
    """Train as one rank of a run that another launcher has started: rank 0 decides and tells the others.

    Args:
        config: the configuration.
        resources: what the ranks run on.
        rank: the rank.
        local_rank: its number on this machine.
        started_s: when the run was started, by `time.monotonic`.
        loopback_port: see `join_processes`.
        restarts: how often the launcher has started the ranks again.

    Raises:
        PipekitError: if the run cannot be started, or cannot go on; where rank 0 cannot decide, all ranks say why.
    """
    decided: list[Decision] = []
    folder, is_local = RunFolder(config.run.dir), config.checkpoint.storage == "local"
    gathered = ""

    def decide(on_progress: ProgressCallback) -> str:
        if not is_local:
            stack.enter_context(hold_run(folder.path))
        start = find_start(config)
        if start is not None and gathered:
            start = replace(start, warning=gathered)
        check_writable(folder.path, name="run.dir=")
        decided.append(prepare_run(config, resources, start=start, on_progress=on_progress))
        if (warning := check_room(decided[0].plan)) is not None:
            on_progress(f"warning: {warning}", None)
        write_plan(decided[0].plan)
        return decided[0].plan.to_json()

    assert resources.world_size is not None
    with (
        contextlib.ExitStack() as stack,
        _own_log(config, rank=rank) as terminal,
        joined(
            config,
            plan_device(config, resources.num_gpus),
            local_rank=local_rank,
            loopback_port=loopback_port,
            restarts=restarts,
        ) as device,
    ):
        hosts = HostFolders.find(folder.path)
        local = (
            ", or keep checkpoints on the disks of all hosts, each file on two of them, with checkpoint.storage=local"
        )
        check_folders(folder.path, hosts, are_shared=not is_local, advice=local)
        if is_local:
            run_together(lambda: stack.enter_context(hold_run(folder.path)) if hosts.leads else None)
            gathered = gather_start(config.checkpoint.resume, folder.checkpoints, hosts)
            gather_file(folder.metrics, hosts)
            run_together(lambda: adopt_config(folder) if hosts.leads else None)
        text = tell_from_first_rank(
            decide,
            store=prefixed_store("pipekit/plan"),
            rank=rank,
            world_size=resources.world_size,
            timeout_s=config.run.timeout_s,
            purpose="plan the run",
        )
        plan = decided[0].plan if decided else Plan.from_json(text)
        if is_local:
            run_together(lambda: write_plan(plan) if hosts.leads and not decided else None)
        torch.set_num_threads(plan.num_threads)
        trial = start_trial(plan, device, decided[0].specs if decided else None)
        return _train(trial, terminal, started_s, is_watched=False)


def start_trial(plan: Plan, device: torch.device, specs: Sequence[LayerSpec] | None = None) -> LayersTrial:
    """Build this rank's trial, with the process groups of the run. Every rank calls this together.

    The trial builds the model unless `specs` are given.

    Raises:
        PipekitError: if the trial cannot be built, or the ranks' units do not fit together.
    """
    kind = load_trial(plan.config)
    mpu = kind.build_mpu(plan.layout, placement=plan.placement, timeout_s=plan.config.run.timeout_s)
    check_mpu(mpu, layout=plan.layout, placement=plan.placement)
    specs = build_trained_layers(plan.config, kind) if specs is None else specs
    return kind(RunContext(plan, specs, mpu, device, RunFolder(plan.config.run.dir)))


@contextlib.contextmanager
def joined(
    config: Config,
    device: Literal["cpu", "cuda"],
    *,
    local_rank: int,
    loopback_port: int | None = None,
    restarts: int = 0,
) -> Iterator[torch.device]:
    """Join the other processes, yield this rank's device, and leave them where the block succeeds."""
    yield join_processes(
        device=device,
        timeout_s=config.run.timeout_s,
        local_rank=local_rank,
        loopback_port=loopback_port,
        restarts=restarts,
    )
    with contextlib.suppress(RuntimeError):
        leave_processes()


@contextlib.contextmanager
def _own_log(config: Config, *, rank: int) -> Iterator[TextIO]:
    with chatter_to(RunFolder(config.run.dir).logs / f"rank-{rank}.log") as terminal:
        logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
        warnings.simplefilter("default")
        yield terminal


def _train(trial: LayersTrial, terminal: TextIO, started_s: float, *, is_watched: bool) -> TrialResult:
    """Train; `is_watched` by a launcher of ours, which has shown the plan and listens to heartbeats."""
    plan = trial.context.plan
    config = plan.config
    context = trial.context
    mpu, folder = context.mpu, context.folder
    error: Exception | None = None
    callbacks: list[TrialCallback] = []
    if mpu.should_report_metrics:
        console = make_console(terminal)
        progress = ConsoleProgress(console, plan, interval=config.logging.interval)
        try:
            _check_tokenizer(trial)
            callbacks += [
                MetricsFile(folder, progress.on_warning),
                EventsFile(folder, progress.on_warning, _about(plan)),
            ]
            settings = {**config.model_dump(mode="json"), "plan": plan_facts(plan)}
            if config.logging.wandb is not None:
                callbacks.append(WandbLogger(config.logging.wandb, folder, settings))
            if config.logging.trackio is not None:
                callbacks.append(TrackioLogger(config.logging.trackio, folder, settings))
        except PipekitError as failure:
            error = failure
        if not is_watched:
            show_plan(plan, console)
        callbacks.append(progress)
        if config.logging.report:
            # Other ranks need no templates.
            from pipekit.training.shipped.report import ReportFile

            callbacks.append(ReportFile(folder, progress.on_warning))
    raise_together(error)
    heartbeat = HeartbeatThread(
        mpu.activity,
        folder.logs,
        rank=mpu.global_rank,
        world_size=plan.layout.world_size,
        stages=mpu.stages,
        pipe_ranks=mpu.pipe.ranks,
        on_beat=None
        if is_watched
        else HangReporter(folder.logs, plan.layout.world_size, config.run.timeout_s, terminal),
    )
    with heartbeat, fp32_products(context.device, tf32=config.train.tf32):
        run = LayersRun(trial)
        run.context.terminal, run.context.started_s = terminal, started_s
        return run.fit(callbacks)


def _about(plan: Plan) -> str:
    """Layout, schedule and precision of a start, in words."""
    layout, schedule = plan.layout, plan.schedule
    table = f"; {schedule.name}, {schedule.num_micro_batches} micro-batches" if layout.pp > 1 else ""
    return f"{layout} on {plan.device}{table}; {plan.precision}"


def _check_tokenizer(trial: LayersTrial) -> None:
    """Check that checkpoints will carry a tokenizer along with which they can be exported and sampled from."""
    if trial.tokenizer_file is None:
        return
    try:
        load_tokenizer(trial.tokenizer_file)
    except DataError as error:
        raise ConfigError(f"{type(trial).__name__}.tokenizer_file: {error}") from None
