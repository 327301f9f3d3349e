"""The processes of a verification: one that records the reference, and the ranks of a layout, compared with it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from pipekit.distributed.mpu import ModelParallelUnit
from pipekit.plan.decide import build_trained_layers
from pipekit.plan.plan import Plan
from pipekit.plan.run_folder import RunFolder
from pipekit.tensor_parallel.collectives import SEQUENCE_DIM
from pipekit.tensor_parallel.flow import has_sequence
from pipekit.tensor_parallel.shards import Shard, shard_of
from pipekit.training.layers_trial import LayersTrial
from pipekit.training.prepare import load_trial
from pipekit.training.run_context import RunContext
from pipekit.verify.activation_recorder import ActivationRecorder
from pipekit.verify.compare import compare_recordings
from pipekit.verify.measurement import MEASUREMENTS_FILE, Measurement, MeasurementKind, save_measurements
from pipekit.verify.recording import Recorder, Recording, TensorKey
from pipekit.verify.reference import build_model, layer_of_parameter, record_reference
from pipekit.verify.replay import compare_updates

if TYPE_CHECKING:
    from pipekit.engine.base_engine import GradientOf
    from pipekit.training.layers_run import LayersRun


@dataclass(frozen=True)
class Task:
    """The task of a process of a verification.

    Attributes:
        folder: for the recording, and `measurements.json`.
        num_steps: number of updates.
        tolerance: largest relative difference, see `pipekit.verify.compare`.
        reference: folder of the reference's recording; None where this process records the reference.
    """

    folder: str
    num_steps: int
    tolerance: float
    reference: str | None = None


def run_task(task: Task, plan: Plan, *, rank: int, local_rank: int, loopback_port: int | None = None) -> None:
    """Record the reference, or train as one rank of a layout and compare it with the reference.

    Args:
        task: what to record.
        plan: the plan.
        rank: the rank.
        local_rank: its number on this machine.
        loopback_port: see `join_processes`.
    """
    torch.set_num_threads(plan.num_threads)
    # fp32 means fp32, also on GPUs that would round to fewer bits.
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    if task.reference is None:
        _run_reference(task, plan)
    else:
        _run_layout(task, plan, Path(task.reference), rank=rank, local_rank=local_rank, loopback_port=loopback_port)


def _run_reference(task: Task, plan: Plan) -> None:
    # A trial may ask the unit for its place in the run, which needs a world, of which this process is all.
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]
    device = torch.device(plan.device, 0) if plan.device == "cuda" else torch.device("cpu")
    mpu = ModelParallelUnit(plan.layout, placement=plan.placement)  # also where the trial has another
    kind = load_trial(plan.config)
    specs = build_trained_layers(plan.config, kind)
    trial = kind(RunContext(plan, specs, mpu, device, RunFolder(plan.config.run.dir)))
    record_reference(trial, Path(task.folder) / "rank-0", num_steps=task.num_steps)


def _run_layout(
    task: Task, plan: Plan, reference: Path, *, rank: int, local_rank: int, loopback_port: int | None
) -> None:
    """Train as a run would, record what passes, and on rank 0 compare it with the reference."""
    # DeepSpeed takes seconds to load, and the reference does without it.
    from pipekit.training.layers_run import LayersRun
    from pipekit.training.run import joined, start_trial

    folder = Path(task.folder)
    with joined(plan.config, plan.device, local_rank=local_rank, loopback_port=loopback_port) as device:
        trial = start_trial(plan, device)
        recorder = Recorder(folder / f"rank-{rank}", rank=rank, coordinate=plan.layout.coordinate(rank))
        _record_steps(LayersRun(trial), recorder, num_steps=task.num_steps)
        dist.barrier()
    if rank == 0:
        measurements = compare_run(trial, Recording(folder), Recording(reference), tolerance=task.tolerance)
        save_measurements(folder / MEASUREMENTS_FILE, measurements, boundaries=plan.boundaries)


def compare_run(trial: LayersTrial, found: Recording, expected: Recording, *, tolerance: float) -> list[Measurement]:
    """Differences of all recorded tensors from the reference."""
    measurements = list(compare_recordings(found, expected, trial.context.plan.layer_names, tolerance=tolerance))
    rates = expected.summaries[0]["rates"]
    updates = compare_updates(
        build_model(trial),
        found,
        build_optimizer=trial.build_optimizer,
        rates=rates,
        momenta=[trial.momentum(step) for step in range(len(rates))],
        gradient_clipping=trial.context.config.train.gradient_clipping,
        tolerance=tolerance,
    )
    return [*measurements, *updates]


def _record_steps(run: LayersRun, recorder: Recorder, *, num_steps: int) -> None:
    engine = run.engine
    module, plan = engine.module, run.hooks.context.plan
    index_of = {name: layer_idx for layer_idx, name in reversed(list(enumerate(plan.layer_names)))}

    def key(kind: MeasurementKind, step: int, name: str) -> TensorKey:
        return TensorKey(kind, step, index_of[layer_of_parameter(name, index_of)], name)

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
    engine.on_gradients = record_gradients
    record_weights("initial weights", 0)
    module.observe_layer = ActivationRecorder(
        recorder, num_micro_batches=plan.batch.num_micro_batches, shard_of_output=_parts_of(module)
    )
    for step in range(num_steps):
        metrics = run.train_batch(None, 0, step).read()
        module.observe_layer = None
        losses.append(metrics["loss"])
        norms.append(metrics["grad_norm"])
        record_weights("weights", step)
    recorder.finish(losses=losses, norms=norms)


def _parts_of(module: Any) -> Callable[[int, Tensor], Shard | None]:
    """Shard of a layer's output that this rank has under sequence parallelism."""
    group = module.tensor_group

    def part(layer_idx: int, tensor: Tensor) -> Shard | None:
        if group is None or not module.returns_shard(layer_idx) or not has_sequence(tensor):
            return None
        return Shard(SEQUENCE_DIM, (tensor.shape[SEQUENCE_DIM] * group.size,), group.rank, group.size)

    return part
