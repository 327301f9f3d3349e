"""The processes of a verification: one that records the reference, and the ranks of a layout, which are held to it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from pipekit.config import Config
from pipekit.distributed.mpu import ModelParallelUnit
from pipekit.plan.choose import load_trial, plan_trial
from pipekit.plan.plan import Plan
from pipekit.plan.run_folder import RunFolder
from pipekit.tensor_parallel.collectives import SEQUENCE_DIM
from pipekit.tensor_parallel.flow import has_sequence
from pipekit.tensor_parallel.shards import Shard, shard_of
from pipekit.training.context import TrialContext
from pipekit.training.trial import Trial
from pipekit.verify.activation_recorder import ActivationRecorder
from pipekit.verify.compare import compare_recordings
from pipekit.verify.measurement import MEASUREMENTS_FILE, Measurement, MeasurementKind, save_measurements
from pipekit.verify.recording import Recorder, Recording, TensorKey
from pipekit.verify.reference import build_model, record_reference
from pipekit.verify.replay import compare_updates

if TYPE_CHECKING:
    from pipekit.engine.step_gradients import GradientOf
    from pipekit.training.trainer import Trainer


def run_reference(config: Config, *, num_devices: int | None, num_threads: int, folder: Path, num_steps: int) -> None:
    """Record the reference, as the only process.

    Args:
        config: the configuration, with a layout of one rank.
        num_devices: GPUs of this machine; None where there are none.
        num_threads: CPU threads of this process.
        folder: for the recording.
        num_steps: how many steps.

    Raises:
        PipekitError: if the model cannot be trained in one process.
    """
    _compute_alike(num_threads)
    plan = plan_trial(config, world_size=1, num_devices=num_devices, measure=False, num_threads=num_threads)
    # A trial may ask the unit for its place in the run, which needs a world, of which this process is all.
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]
    device = torch.device(plan.device, 0) if plan.device == "cuda" else torch.device("cpu")
    unit = ModelParallelUnit(plan.layout, placement=plan.placement)  # also where the trial has another
    trial = load_trial(config)(TrialContext(plan, unit, device, RunFolder(Path(config.run.dir)), None))
    record_reference(trial, folder / "rank-0", num_steps=num_steps)


def run_layout(
    config: Config,
    *,
    rank: int,
    local_rank: int,
    world_size: int,
    num_devices: int | None,
    num_threads: int,
    folder: Path,
    reference: Path,
    tolerance: float,
) -> None:
    """Be one rank of a layout: train as a run would, record what passes, and on rank 0 compare it with the reference.

    Args:
        config: the configuration, with the layout.
        rank: global rank.
        local_rank: rank among the processes of this machine.
        world_size: number of processes.
        num_devices: GPUs of this machine; None where there are none.
        num_threads: CPU threads of this process.
        folder: for the recording, and `measurements.json`.
        reference: folder of the reference's recording.
        tolerance: relative, see `pipekit.verify.compare`.

    Raises:
        PipekitError: if the layout cannot run.
    """
    # DeepSpeed takes seconds to load, and the reference does without it.
    from pipekit.distributed.processes import join_processes, leave_processes
    from pipekit.distributed.unit_check import check_unit
    from pipekit.training.trainer import Trainer

    _compute_alike(num_threads)
    expected = Recording(reference)
    num_steps = len(expected.summaries[0]["losses"])
    plan = plan_trial(
        config, world_size=world_size, num_devices=num_devices, measure=rank == 0, num_threads=num_threads
    )
    device = join_processes(device=plan.device, timeout_s=config.run.timeout_s, local_rank=local_rank)
    plan = replace(plan, boundaries=_boundaries_of_first_rank(plan))
    kind = load_trial(config)
    unit = kind.build_unit(plan.layout, placement=plan.placement, timeout_s=config.run.timeout_s)
    check_unit(unit, layout=plan.layout, placement=plan.placement)
    trial = kind(TrialContext(plan, unit, device, RunFolder(Path(config.run.dir)), None))
    recorder = Recorder(folder / f"rank-{rank}", rank=rank, coordinate=plan.layout.coordinate(rank))
    _record_steps(Trainer(trial), recorder, num_steps=num_steps)
    dist.barrier()
    with contextlib.suppress(RuntimeError):
        leave_processes()
    if rank == 0:
        measurements = compare_run(trial, Recording(folder), expected, tolerance=tolerance)
        save_measurements(folder / MEASUREMENTS_FILE, measurements, boundaries=plan.boundaries)


def compare_run(trial: Trial, found: Recording, expected: Recording, *, tolerance: float) -> list[Measurement]:
    """Return how far everything that was recorded is from the reference."""
    names = trial.context.plan.layer_names
    measurements = list(compare_recordings(found, expected, names, tolerance=tolerance))
    updates = compare_updates(
        build_model(trial),
        found,
        build_optimizer=trial.build_optimizer,
        rates=expected.summaries[0]["rates"],
        gradient_clipping=trial.context.config.train.gradient_clipping,
        tolerance=tolerance,
    )
    return [*measurements, *updates]


def _record_steps(trainer: Trainer, recorder: Recorder, *, num_steps: int) -> None:
    from pipekit.engine.step_gradients import call_before_update

    engine = trainer.engine
    module, plan = engine.module, trainer.context.plan
    layer_of = {f"{name}.": layer_idx for layer_idx, name in reversed(list(enumerate(plan.layer_names)))}

    def key(kind: MeasurementKind, step: int, name: str) -> TensorKey:
        layer = max((prefix for prefix in layer_of if name.startswith(prefix)), key=len)
        return TensorKey(kind, step, layer_of[layer], name)

    def record_weights(kind: MeasurementKind, step: int) -> None:
        for name, parameter, _ in module.named_logical_parameters():
            # As they are computed with, frozen or not: under ZeRO-3 they are gathered.
            weights = engine.view.full_frozen(parameter)
            recorder.write(key(kind, step, name), weights, shard=shard_of(parameter))

    def record_gradients(gradient_of: GradientOf) -> None:
        for name, parameter, _ in module.named_logical_parameters():
            gradient = gradient_of(parameter) if parameter.requires_grad else None
            if gradient is not None:
                recorder.write(key("gradient", len(losses), name), gradient, shard=shard_of(parameter))

    losses: list[float] = []
    norms: list[float] = []
    call_before_update(engine, record_gradients)
    record_weights("initial weights", 0)
    module.observe_layer = ActivationRecorder(
        recorder, num_micro_batches=plan.batch.num_micro_batches, shard_of_output=_parts_of(module)
    )
    for step in range(num_steps):
        metrics = trainer.train_step()
        module.observe_layer = None
        losses.append(float(metrics.loss or 0.0))
        norms.append(float(metrics.grad_norm or 0.0))
        record_weights("weights", step)
    recorder.finish(losses=losses, norms=norms)


def _parts_of(module: Any) -> Callable[[int, Tensor], Shard | None]:
    """Return what tells which part of a layer's output this rank has, under sequence parallelism."""
    group = module.tensor_group

    def part(layer_idx: int, tensor: Tensor) -> Shard | None:
        if group is None or not module.returns_shard(layer_idx) or not has_sequence(tensor):
            return None
        return Shard(SEQUENCE_DIM, (tensor.shape[SEQUENCE_DIM] * group.size,), group.rank, group.size)

    return part


def _compute_alike(num_threads: int) -> None:
    torch.set_num_threads(num_threads)
    # fp32 means fp32, also on GPUs that would round to fewer bits.
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False


def _boundaries_of_first_rank(plan: Plan) -> list[int]:
    told = [list(plan.boundaries)]
    dist.broadcast_object_list(told, src=0)
    return told[0]
