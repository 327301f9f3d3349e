"""Quick estimates of the time of a step and the memory of a rank, to choose the layouts that are worth a simulation."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from math import gcd

from pipekit.partitioners import balanced_boundaries
from pipekit.predictions.layer_costs import stage_activation_bytes
from pipekit.predictions.model_states import bytes_per_parameter
from pipekit.predictions.parallel_plan import ParallelPlan
from pipekit.predictions.prediction import PlannedModel
from pipekit.predictions.timing import Cluster, action_costs, reduction_s, sharding_s, update_s
from pipekit.schedules import Costs, plan_schedule, schedule_placement, simulate
from pipekit.settings.activations import ActivationCheckpointing

# The bubble of a longer pipeline is that of one with so many ranks and as many micro-batches a rank, times its length.
_MOST_RANKS = 8
# Where stages are cut more evenly than for an estimate, the fullest rank may hold less.
_SURELY = 0.75
# Messages are told apart by hundredths of a rank's forward, and gradients by twentieths.
_MESSAGE, _GRADIENT = 0.01, 0.05


@dataclass(frozen=True)
class Estimate:
    """Estimated time and memory of a layout.

    Attributes:
        step_time_s: seconds of a step.
        memory_bytes: peak memory of the fullest rank.
        least_bytes: lower bound on it.
    """

    step_time_s: float
    memory_bytes: float
    least_bytes: float


@dataclass(frozen=True)
class _Stages:
    """The stages of a model; the same for every layout with as many of them.

    Attributes:
        boundaries: of the stages.
        parameters: of each stage, on one tensor-parallel rank.
        activation_bytes: activations of each stage for one micro-batch.
        loss_bytes: bytes that the loss keeps of it.
        tied_parameters: those that are counted in several layers.
    """

    boundaries: Sequence[int]
    parameters: Sequence[int]
    activation_bytes: Sequence[int]
    loss_bytes: int
    tied_parameters: int


@dataclass(frozen=True)
class _Pattern:
    """Bubble and activations in flight of a schedule whose stages are alike.

    Attributes:
        bubble: idle time of each rank in a step, in forwards of a rank.
        in_flight: for each stage, the most micro-batches that are in flight at once.
        overlap: for each rank, the part of its stages' activations that is there at the same time.
    """

    bubble: float
    in_flight: Sequence[float]
    overlap: Sequence[float]


class Estimator:
    """Estimates layouts of one model; what they have in common is computed once."""

    def __init__(self, model: PlannedModel) -> None:
        self._model = model
        self._stages: dict[tuple[int, int, int, ActivationCheckpointing | None], _Stages] = {}
        self._costs: dict[Hashable, Costs] = {}
        self._boundaries: dict[tuple[tuple[int, ...], tuple[int, ...]], list[int]] = {}

    def estimate(self, plan: ParallelPlan, cluster: Cluster) -> Estimate:
        """Estimated time and memory of a layout.

        The step is that of the busiest rank, with the bubble that the schedule has where stages are alike, the
        reduction over replicas behind it, and the update. The memory leaves messages and updates out.
        """
        layout = plan.layout
        stages = self._stages_of(plan)
        placement = schedule_placement(plan.schedule, pp=layout.pp, stages_per_rank=plan.stages_per_rank)
        costs = self._stage_costs(plan, cluster, stages, placement)
        rank_s = [0.0] * layout.pp
        rank_parameters = [0] * layout.pp
        for stage, rank in enumerate(placement):
            rank_s[rank] += costs.forward_s[stage] + costs.input_gradient_s[stage] + costs.weight_gradient_s[stage]
            rank_parameters[rank] += stages.parameters[stage]
        if placement[0] == placement[-1]:
            rank_parameters[placement[0]] -= stages.tied_parameters
        parameters = max(rank_parameters)
        precision = self._model.precision
        behind_s = reduction_s(parameters, cluster, precision=precision, zero=plan.zero)
        offload = self._model.offload
        behind_s += update_s(parameters, cluster, precision=precision, zero=plan.zero, offload=offload)
        forward_s, pattern = _pattern_of(plan, costs)
        compute_s = plan.num_micro_batches * max(rank_s) + forward_s * pattern.bubble
        compute_s += sharding_s(
            parameters,
            costs,
            plan.num_micro_batches,
            cluster,
            precision=precision,
            zero=plan.zero,
            offload=offload,
        )
        per_parameter = bytes_per_parameter(
            precision=precision,
            zero=plan.zero,
            dp=layout.dp,
            states=self._model.optimizer_states,
            offload=offload,
        )
        standing = [per_parameter * number for number in rank_parameters]
        estimated, least = list(standing), list(standing)
        for rank, number, size in zip(placement, pattern.in_flight, stages.activation_bytes, strict=True):
            estimated[rank] += pattern.overlap[rank] * (number * size)
            least[rank] = max(least[rank], standing[rank] + number * size)
        estimated[placement[-1]] += 3 * stages.loss_bytes
        return Estimate(compute_s + behind_s, max(estimated), _SURELY * max(least))

    def boundaries(self, plan: ParallelPlan) -> Sequence[int]:
        """Boundaries of the stages that balance the operations of a layout's ranks."""
        placement = schedule_placement(plan.schedule, pp=plan.layout.pp, stages_per_rank=plan.stages_per_rank)
        return self._balanced(plan.micro_batch_size, placement)

    def _balanced(self, size: int, placement: Sequence[int]) -> list[int]:
        costs = self._model.costs_of(size)
        flops = [layer.flops for layer in costs.layers]
        extras = costs.stage_extras(len(placement), lambda loss: loss.flops)
        # Micro-batches of another size cost the same in other units.
        numbers = [*flops, int(extras[-1])]
        unit = gcd(*numbers) or 1
        key = tuple(number // unit for number in numbers), tuple(placement)
        if key not in self._boundaries:
            self._boundaries[key] = balanced_boundaries(flops, placement, stage_extras=extras)
        return self._boundaries[key]

    def _stages_of(self, plan: ParallelPlan) -> _Stages:
        key = (plan.micro_batch_size, plan.num_stages, plan.layout.tp, plan.checkpointing)
        size, num_stages, tp, _ = key
        if key not in self._stages:
            costs = self._model.costs_of(size)
            # As if each stage had a rank of its own: near enough, and soon found.
            boundaries = self._balanced(size, range(num_stages))
            layers = self._model.layers_of_rank(plan)
            stages = [layers[start:end] for start, end in pairwise(boundaries)]
            self._stages[key] = _Stages(
                boundaries,
                [sum(layer.parameters for layer in stage) for stage in stages],
                [stage_activation_bytes(stage) for stage in stages],
                0 if costs.loss is None else costs.loss.saved_bytes // tp,
                (sum(layer.parameters for layer in costs.layers) - self._model.num_parameters) // tp,
            )
        return self._stages[key]

    def _stage_costs(self, plan: ParallelPlan, cluster: Cluster, stages: _Stages, placement: Sequence[int]) -> Costs:
        # Of the layout, only the links matter beside the number of stages: between nodes, or within one.
        far = cluster.device.inter_node
        are_far = (cluster.link("pipe") == far, cluster.link("tensor") == far)
        splits_backwards = _splits_backwards(plan.schedule, plan.stages_per_rank)
        key = (plan.micro_batch_size, tuple(placement), plan.layout.tp, plan.checkpointing, are_far, splits_backwards)
        if key not in self._costs:
            self._costs[key] = action_costs(
                self._model.recomputing_costs(plan),
                stages.boundaries,
                cluster,
                matmul_format=self._model.matmul_format,
                placement=placement,
                sequence_parallel=plan.sequence_parallel,
                splits_backwards=splits_backwards,
            )
        return self._costs[key]


@cache
def _splits_backwards(schedule: str, stages_per_rank: int) -> bool:
    """True if a schedule splits backwards where it has a pipeline to fill."""
    return bool(plan_schedule(schedule, pp=2, num_micro_batches=4, stages_per_rank=stages_per_rank).split_backwards)


def _pattern_of(plan: ParallelPlan, costs: Costs) -> tuple[float, _Pattern]:
    """Seconds of a rank's forward, and the pattern of the schedule."""
    pp = plan.layout.pp
    forward_s, inputs_s, weights_s = (
        sum(seconds) / pp for seconds in (costs.forward_s, costs.input_gradient_s, costs.weight_gradient_s)
    )
    unit_s = forward_s or 1.0
    ranks = min(pp, _MOST_RANKS)
    num_micro_batches = max(1, round(plan.num_micro_batches * ranks / pp))
    if plan.schedule == "interleaved-1f1b":
        num_micro_batches = -(-num_micro_batches // ranks) * ranks
    # More of them make no more bubble, but for what each waits for messages.
    pattern = _pattern(
        plan.schedule,
        ranks,
        plan.stages_per_rank,
        min(num_micro_batches, 3 * ranks),
        *(
            round(seconds / unit_s / step) * step
            for seconds, step in (
                (forward_s, _GRADIENT),
                (inputs_s, _GRADIENT),
                (weights_s, _GRADIENT),
                (costs.transfer_s, _MESSAGE),
            )
        ),
    )
    longer = (pp - 1) / (ranks - 1) if ranks > 1 else 1.0
    in_flight = [
        min(plan.num_micro_batches, pp / ranks * pattern.in_flight[stage * ranks // pp])
        for stage in range(plan.num_stages)
    ]
    overlap = [pattern.overlap[rank * ranks // pp] for rank in range(pp)]
    return unit_s, _Pattern(longer * pattern.bubble, in_flight, overlap)


@cache
def _pattern(
    schedule: str,
    pp: int,
    stages_per_rank: int,
    num_micro_batches: int,
    forward: float,
    inputs: float,
    weights: float,
    transfer: float,
) -> _Pattern:
    table = plan_schedule(schedule, pp=pp, num_micro_batches=num_micro_batches, stages_per_rank=stages_per_rank)
    costs = Costs.uniform(
        pp * stages_per_rank,
        forward_s=forward / stages_per_rank,
        input_gradient_s=inputs / stages_per_rank,
        weight_gradient_s=weights / stages_per_rank,
        transfer_s=transfer,
    )
    timeline = simulate(table, costs)
    in_flight = table.peak_of_stages()
    of_ranks = [sum(in_flight[stage] for stage in table.stages_of(rank)) for rank in range(pp)]
    return _Pattern(
        timeline.step_time_s - num_micro_batches * (forward + inputs + weights),
        in_flight,
        [peak / separate for peak, separate in zip(timeline.peak_bytes, of_ranks, strict=True)],
    )
