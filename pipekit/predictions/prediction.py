"""Prediction of a run under one layout: time of a step, and computation and memory of every rank."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from pipekit.predictions.devices import Device, MatmulFormat
from pipekit.predictions.elements import Precision, Shape, count_elements
from pipekit.predictions.layer_costs import LayerCosts, ModelCosts, recompute_layers, shard_layers
from pipekit.predictions.memory import MemoryParts, peak_memory, stage_contents
from pipekit.predictions.model_states import ADAM_STATES, Offload, OptimizerStates
from pipekit.predictions.parallel_plan import ParallelPlan
from pipekit.predictions.timing import Cluster, StepTimes, action_costs, step_times


@dataclass(frozen=True)
class PlannedModel:
    """A model as far as predictions need it.

    Attributes:
        costs_of: costs of its layers by the micro-batch size in sequences.
        shapes_of: shapes of each layer's trainable parameters by logical name, on one tensor-parallel rank, by the
            tensor-parallel degree.
        layer_names: logical name of each layer.
        sequence_length: tokens of a sequence.
        precision: of weights and activations.
        optimizer_states: tensors that its optimizer keeps.
        offload: the states that are kept off the memory in which the devices compute.
        frozen_shapes_of: like `shapes_of`, of the frozen parameters; None where there are none.
        is_timed: whether `costs_of` tells measured seconds too.
        tf32: whether matrix products of fp32 are computed in TF32, on devices that have it.
    """

    costs_of: Callable[[int], ModelCosts]
    shapes_of: Callable[[int], Sequence[Mapping[str, Shape]]]
    layer_names: Sequence[str]
    sequence_length: int
    precision: Precision
    optimizer_states: OptimizerStates = ADAM_STATES
    offload: Offload = "none"
    frozen_shapes_of: Callable[[int], Sequence[Mapping[str, Shape]]] | None = None
    is_timed: bool = False
    tf32: bool = False

    @property
    def matmul_format(self) -> MatmulFormat:
        """Number format of its matrix products."""
        return "tf32" if self.precision == "fp32" and self.tf32 else self.precision

    @property
    def num_parameters(self) -> int:
        """Trainable parameters, tied ones once."""
        return count_elements(*self.shapes_of(1))

    @property
    def layer_parameters(self) -> list[int]:
        """Trainable parameters of each layer; a tied layer's wherever it occurs."""
        return [count_elements(layer) for layer in self.shapes_of(1)]

    def recomputing_costs(self, plan: ParallelPlan) -> ModelCosts:
        """Costs of the whole model under the activation checkpointing of a plan."""
        costs = self.costs_of(plan.micro_batch_size)
        return replace(costs, layers=recompute_layers(costs.layers, plan.checkpointing, self.layer_names))

    def layers_of_rank(self, plan: ParallelPlan) -> list[LayerCosts]:
        """Costs of each layer on one tensor-parallel rank of a plan, under its activation checkpointing."""
        tp, layers = plan.layout.tp, self.costs_of(plan.micro_batch_size).layers
        sharded = shard_layers(layers, tp, sequence_parallel=plan.sequence_parallel)
        return recompute_layers(sharded, plan.checkpointing, self.layer_names, tp=tp)

    @property
    def frozen_parameters(self) -> list[int]:
        """Frozen parameters of each layer; a tied layer's wherever it occurs."""
        if self.frozen_shapes_of is None:
            return [0] * len(self.layer_names)
        return [count_elements(layer) for layer in self.frozen_shapes_of(1)]


@dataclass(frozen=True)
class RankPrediction:
    """Prediction of one pipeline rank; its replicas and tensor-parallel peers are like it.

    Attributes:
        stages: the layers of each of its stages.
        parameters: trainable ones, on one tensor-parallel rank, tied ones once.
        memory: its peak memory.
        time_s: seconds of a step in which it computes.
    """

    stages: tuple[range, ...]
    parameters: int
    memory: MemoryParts
    time_s: float


@dataclass(frozen=True)
class Prediction:
    """Time, speed and memory of a run under one layout.

    Attributes:
        plan: the layout and its options.
        num_parameters: trainable parameters of the model, tied ones once.
        boundaries: stage `s` holds layers `boundaries[s]` to `boundaries[s + 1] - 1`.
        ranks: one for each pipeline rank.
        times: the step.
        tokens_per_s: of the whole run.
        tflops_per_device: operations per second of each device, in 10^12, those of recomputation counted.
    """

    plan: ParallelPlan
    num_parameters: int
    boundaries: tuple[int, ...]
    ranks: tuple[RankPrediction, ...]
    times: StepTimes
    tokens_per_s: float
    tflops_per_device: float

    @property
    def step_time_s(self) -> float:
        """Seconds of a step."""
        return self.times.step_time_s

    @property
    def memory_bytes(self) -> int:
        """Peak memory of the fullest rank."""
        return max(rank.memory.total for rank in self.ranks)


def predict(model: PlannedModel, plan: ParallelPlan, device: Device, boundaries: Sequence[int]) -> Prediction:
    """Predict a run under one layout, each rank on a device, stage `s` from layer `boundaries[s]` on.

    Raises:
        PipekitError: if the layout cannot run; it says why.
    """
    schedule, shorter = plan.plan_schedules()
    tp = plan.layout.tp
    costs = model.recomputing_costs(plan)
    cluster = Cluster(device, plan.layout)
    frozen = model.frozen_shapes_of(tp) if model.frozen_shapes_of is not None else ()
    stages = stage_contents(model.layers_of_rank(plan), model.shapes_of(tp), boundaries, frozen=frozen)
    times = step_times(
        schedule,
        plan.num_micro_batches,
        action_costs(
            costs,
            boundaries,
            cluster,
            matmul_format=model.matmul_format,
            placement=schedule.placement,
            sequence_parallel=plan.sequence_parallel,
            splits_backwards=bool(schedule.split_backwards),
        ),
        cluster,
        stage_parameters=[count_elements(stage.parameters) for stage in stages],
        precision=model.precision,
        zero=plan.zero,
        offload=model.offload,
        shorter=shorter,
    )
    memory = peak_memory(
        stages,
        schedule,
        loss=None if costs.loss is None else shard_layers([costs.loss], tp)[0],
        precision=model.precision,
        zero=plan.zero,
        dp=plan.layout.dp,
        optimizer_states=model.optimizer_states,
        offload=model.offload,
    )
    ranks = [
        RankPrediction(
            stages=tuple(range(boundaries[stage], boundaries[stage + 1]) for stage in schedule.stages_of(rank)),
            parameters=count_elements(*(stages[stage].parameters for stage in schedule.stages_of(rank))),
            memory=memory[rank],
            time_s=times.busy_s[rank],
        )
        for rank in range(plan.layout.pp)
    ]
    everything = [*costs.layers, *([] if costs.loss is None else [costs.loss])]
    flops = sum(layer.flops for layer in everything)
    flops += sum(
        layer.forward_flops * layer.is_recomputed if schedule.split_backwards else layer.recomputed_flops
        for layer in everything
    )
    num_flops = flops * plan.num_micro_batches * plan.layout.dp
    return Prediction(
        plan=plan,
        num_parameters=model.num_parameters,
        boundaries=tuple(boundaries),
        ranks=tuple(ranks),
        times=times,
        tokens_per_s=plan.global_batch_size * model.sequence_length / times.step_time_s,
        tflops_per_device=num_flops / plan.layout.world_size / times.step_time_s / 1e12,
    )
