"""The time of a step and the memory of a rank by formulas: near enough to tell which layouts are worth a simulation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from pipekit.partitioners import minmax_boundaries
from pipekit.planner.layer_costs import stage_activation_bytes
from pipekit.planner.memory import Precision
from pipekit.planner.prediction import Choice, PlannedModel
from pipekit.planner.sharding import shard_layers
from pipekit.planner.timing import BYTES_OF, Cluster, all_gather_s, all_reduce_s, stage_costs
from pipekit.schedules import Costs, schedule_placement


@dataclass(frozen=True)
class Rough:
    """What a layout takes, roughly.

    Attributes:
        step_time_s: seconds of a step.
        memory_bytes: what the fullest rank holds.
    """

    step_time_s: float
    memory_bytes: float


@dataclass(frozen=True)
class _Cut:
    """A model cut into stages; the same for every layout with as many of them.

    Attributes:
        boundaries: of the stages.
        parameters: of each stage, on one tensor-parallel rank.
        activation_bytes: what each stage holds of one micro-batch.
        loss_bytes: what the loss keeps of it.
    """

    boundaries: Sequence[int]
    parameters: Sequence[int]
    activation_bytes: Sequence[int]
    loss_bytes: int


class Estimator:
    """Estimates layouts of one model, and remembers what they have in common."""

    def __init__(self, model: PlannedModel) -> None:
        self._model = model
        self._cuts: dict[tuple[int, int, int, bool], _Cut] = {}
        self._costs: dict[tuple[int, int, int, bool, bool], Costs] = {}

    def estimate(self, choice: Choice, cluster: Cluster) -> Rough:
        """Return what a layout takes.

        The step is that of the busiest rank, with the bubble that the schedule has where stages are alike, the
        reduction over replicas behind it, and the update.
        """
        layout, size = choice.layout, choice.micro_batch_size
        num_stages = layout.pp * choice.stages_per_rank
        cut = self._cut(size, num_stages, layout.tp, choice.checkpointing)
        placement = schedule_placement(choice.schedule, pp=layout.pp, stages_per_rank=choice.stages_per_rank)
        costs = self._stage_costs(choice, cluster, cut)
        rank_s = [0.0] * layout.pp
        rank_parameters = [0] * layout.pp
        rank_bytes = [0.0] * layout.pp
        for stage, rank in enumerate(placement):
            rank_s[rank] += costs.forward_s[stage] + costs.input_gradient_s[stage] + costs.weight_gradient_s[stage]
            rank_parameters[rank] += cut.parameters[stage]
            rank_bytes[rank] += cut.activation_bytes[stage] / choice.stages_per_rank
        parameters = max(rank_parameters)
        precision = self._model.precision
        reduced = 2 if precision == "fp16" else 4
        reduction_s = all_reduce_s(reduced * parameters, layout.dp, cluster.data_link)
        shares = choice.zero > 0 or precision != "fp32"
        update_s = 30 * parameters / (layout.dp if shares else 1) / cluster.device.memory_bandwidth
        if shares:
            update_s += all_gather_s(BYTES_OF[precision] * parameters, layout.dp, cluster.data_link)
        step_s = choice.num_micro_batches * max(rank_s) + _bubble_s(choice, costs) + reduction_s + update_s
        standing = bytes_of_parameter(precision, choice.zero, layout.dp)
        held = [
            standing * number + _in_flight(choice, rank) * activations
            for rank, (number, activations) in enumerate(zip(rank_parameters, rank_bytes, strict=True))
        ]
        held[placement[-1]] += 3 * cut.loss_bytes
        return Rough(step_s, max(held))

    def boundaries(self, choice: Choice) -> Sequence[int]:
        """Return the stages that an estimate was made for: the costliest stage is as small as can be."""
        num_stages = choice.layout.pp * choice.stages_per_rank
        return self._cut(choice.micro_batch_size, num_stages, choice.layout.tp, choice.checkpointing).boundaries

    def _cut(self, size: int, num_stages: int, tp: int, checkpointing: bool) -> _Cut:
        key = (size, num_stages, tp, checkpointing)
        if key not in self._cuts:
            costs = self._model.costs_of(size)
            flops = [layer.flops for layer in costs.layers]
            if costs.loss is not None:
                flops[-1] += costs.loss.flops
            boundaries = minmax_boundaries(flops, num_stages)
            layers = shard_layers(costs.layers, tp)
            self._cuts[key] = _Cut(
                boundaries,
                [sum(layer.parameters for layer in layers[start:end]) for start, end in pairwise(boundaries)],
                [
                    stage_activation_bytes(layers[start:end], checkpointing=checkpointing)
                    for start, end in pairwise(boundaries)
                ],
                0 if costs.loss is None else costs.loss.saved_bytes // tp,
            )
        return self._cuts[key]

    def _stage_costs(self, choice: Choice, cluster: Cluster, cut: _Cut) -> Costs:
        # Of the layout, only the links matter beside the number of stages: between nodes, or within one.
        is_far = cluster.pipe_link == cluster.device.inter_node
        key = (choice.micro_batch_size, len(cut.parameters), choice.layout.tp, choice.checkpointing, is_far)
        if key not in self._costs:
            costs = self._model.costs_of(choice.micro_batch_size)
            self._costs[key] = stage_costs(
                costs.layers,
                cut.boundaries,
                cluster,
                precision=self._model.precision,
                checkpointing=choice.checkpointing,
                loss=costs.loss,
            )
        return self._costs[key]


def _bubble_s(choice: Choice, costs: Costs) -> float:
    """Return for how long ranks wait in a step, where all stages take their mean.

    Source: Narayanan et al. 2021, section 2.2; Qi et al. 2023, "Zero Bubble Pipeline Parallelism", table 2.
    """
    pp = choice.layout.pp
    forward, inputs, weights = (
        sum(seconds) / pp for seconds in (costs.forward_s, costs.input_gradient_s, costs.weight_gradient_s)
    )
    of_one_rank = {
        "interleaved-1f1b": (forward + inputs + weights) / choice.stages_per_rank,
        "zb-h1": max(0.0, forward + inputs - weights),
        "zb-v": max(0.0, forward + inputs - weights) / 2,
    }.get(choice.schedule, forward + inputs + weights)
    return (pp - 1) * (of_one_rank + 2 * choice.stages_per_rank * costs.transfer_s)


def _in_flight(choice: Choice, rank: int) -> int:
    """Return the stage activations that a rank holds at most."""
    pp, per_rank = choice.layout.pp, choice.stages_per_rank
    most = {
        "1f1b": pp - rank,
        "zb-h1": pp,
        "interleaved-1f1b": 2 * (pp - rank - 1) + (per_rank - 1) * pp + 1,
        "zb-v": 2 * pp,
    }[choice.schedule]
    return min(most, choice.num_micro_batches * per_rank)


def bytes_of_parameter(precision: Precision, zero: int, dp: int) -> float:
    """Return what a rank holds for each parameter: weight, gradient, and its share of master and moments."""
    if precision == "fp32":
        return 8 + 12 / dp if zero else 16
    weight_and_gradient = 8 if precision == "bf16" else 6
    return weight_and_gradient + 12 / dp
