"""The time of a step and the memory of a rank, quickly: near enough to tell which layouts are worth a simulation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from math import gcd

from pipekit.partitioners import balanced_boundaries
from pipekit.predictions.elements import Precision
from pipekit.predictions.layer_costs import layer_flops, stage_activation_bytes
from pipekit.predictions.model_costs import stage_extras
from pipekit.predictions.prediction import Choice, PlannedModel
from pipekit.predictions.sharding import shard_layers
from pipekit.predictions.timing import Cluster, reduction_s, stage_costs, update_s
from pipekit.schedules import Costs, plan_schedule, schedule_placement, simulate

# The bubble of a longer pipeline is that of one with so many ranks and as many micro-batches a rank, times its length.
_MOST_RANKS = 8
# Where stages are cut more evenly than here, the fullest rank may hold less.
_SURELY = 0.75
# Messages and gradients are told apart by hundredths of a rank's forward.
_DIGITS = 2


@dataclass(frozen=True)
class Rough:
    """What a layout takes, roughly.

    Attributes:
        step_time_s: seconds of a step.
        memory_bytes: what the fullest rank holds.
        least_bytes: what it holds at the very least.
    """

    step_time_s: float
    memory_bytes: float
    least_bytes: float


@dataclass(frozen=True)
class _Cut:
    """A model cut into stages; the same for every layout with as many of them.

    Attributes:
        boundaries: of the stages.
        parameters: of each stage, on one tensor-parallel rank.
        activation_bytes: what each stage holds of one micro-batch.
        loss_bytes: what the loss keeps of it.
        tied_parameters: those that are counted in several layers.
    """

    boundaries: Sequence[int]
    parameters: Sequence[int]
    activation_bytes: Sequence[int]
    loss_bytes: int
    tied_parameters: int


@dataclass(frozen=True)
class _Shape:
    """What a schedule makes of stages that are alike.

    Attributes:
        bubble: for how long each rank waits in a step, in forwards of a rank.
        in_flight: of how many micro-batches each stage holds activations at most.
        together: the part of this that the stages of a rank hold at the same time, by rank.
    """

    bubble: float
    in_flight: Sequence[float]
    together: Sequence[float]


class Estimator:
    """Estimates layouts of one model, and remembers what they have in common."""

    def __init__(self, model: PlannedModel) -> None:
        self._model = model
        self._cuts: dict[tuple[int, int, int, bool], _Cut] = {}
        self._costs: dict[tuple[int, int, int, bool, tuple[bool, ...]], Costs] = {}
        self._boundaries: dict[tuple[tuple[int, ...], tuple[int, ...]], list[int]] = {}

    def estimate(self, choice: Choice, cluster: Cluster) -> Rough:
        """Return what a layout takes.

        The step is that of the busiest rank, with the bubble that the schedule has where stages are alike, the
        reduction over replicas behind it, and the update.
        """
        layout = choice.layout
        num_stages = layout.pp * choice.stages_per_rank
        cut = self._cut(choice.micro_batch_size, num_stages, layout.tp, choice.checkpointing)
        costs = self._stage_costs(choice, cluster, cut)
        rank_s = [0.0] * layout.pp
        rank_parameters = [0] * layout.pp
        placement = schedule_placement(choice.schedule, pp=layout.pp, stages_per_rank=choice.stages_per_rank)
        for stage, rank in enumerate(placement):
            rank_s[rank] += costs.forward_s[stage] + costs.input_gradient_s[stage] + costs.weight_gradient_s[stage]
            rank_parameters[rank] += cut.parameters[stage]
        if placement[0] == placement[-1]:
            rank_parameters[placement[0]] -= cut.tied_parameters
        parameters = max(rank_parameters)
        precision = self._model.precision
        behind_s = reduction_s(parameters, cluster)
        behind_s += update_s(parameters, cluster, precision=precision, zero=choice.zero)
        forward_s, shape = _shape_of(choice, costs)
        compute_s = choice.num_micro_batches * max(rank_s) + forward_s * shape.bubble
        standing = bytes_of_parameter(precision, choice.zero, layout.dp)
        held = [standing * number for number in rank_parameters]
        least = list(held)
        for stage, rank in enumerate(placement):
            activations = shape.in_flight[stage] * cut.activation_bytes[stage]
            held[rank] += shape.together[rank] * activations
            least[rank] = max(least[rank], standing * rank_parameters[rank] + activations)
        held[placement[-1]] += 3 * cut.loss_bytes
        return Rough(compute_s + behind_s, max(held), _SURELY * max(least))

    def boundaries(self, choice: Choice) -> Sequence[int]:
        """Return the stages under which the ranks of a layout have as many operations each."""
        placement = schedule_placement(choice.schedule, pp=choice.layout.pp, stages_per_rank=choice.stages_per_rank)
        return self._balanced(choice.micro_batch_size, placement)

    def _balanced(self, size: int, placement: Sequence[int]) -> list[int]:
        costs = self._model.costs_of(size)
        flops = [layer.flops for layer in costs.layers]
        extras = stage_extras(costs, len(placement), layer_flops)
        # Micro-batches of another size cost the same in other units.
        key = _in_lowest_terms([*flops, int(extras[-1])]), tuple(placement)
        if key not in self._boundaries:
            self._boundaries[key] = balanced_boundaries(flops, placement, stage_extras=extras)
        return self._boundaries[key]

    def _cut(self, size: int, num_stages: int, tp: int, checkpointing: bool) -> _Cut:
        key = (size, num_stages, tp, checkpointing)
        if key not in self._cuts:
            costs = self._model.costs_of(size)
            # As if each stage had a rank of its own: near enough, and soon found.
            boundaries = self._balanced(size, range(num_stages))
            layers = shard_layers(costs.layers, tp)
            self._cuts[key] = _Cut(
                boundaries,
                [sum(layer.parameters for layer in layers[start:end]) for start, end in pairwise(boundaries)],
                [
                    stage_activation_bytes(layers[start:end], checkpointing=checkpointing)
                    for start, end in pairwise(boundaries)
                ],
                0 if costs.loss is None else costs.loss.saved_bytes // tp,
                (sum(layer.parameters for layer in costs.layers) - self._model.num_parameters) // tp,
            )
        return self._cuts[key]

    def _stage_costs(self, choice: Choice, cluster: Cluster, cut: _Cut) -> Costs:
        # Of the layout, only the links matter beside the number of stages: between nodes, or within one.
        are_far = tuple(link == cluster.device.inter_node for link in (cluster.pipe_link, cluster.tensor_link))
        key = (choice.micro_batch_size, len(cut.parameters), choice.layout.tp, choice.checkpointing, are_far)
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


def _in_lowest_terms(numbers: Sequence[int]) -> tuple[int, ...]:
    unit = gcd(*numbers) or 1
    return tuple(number // unit for number in numbers)


def _shape_of(choice: Choice, costs: Costs) -> tuple[float, _Shape]:
    """Return the seconds of a rank's forward, and what the schedule makes of a pipeline."""
    pp = choice.layout.pp
    forward_s, inputs_s, weights_s = (
        sum(seconds) / pp for seconds in (costs.forward_s, costs.input_gradient_s, costs.weight_gradient_s)
    )
    unit_s = forward_s or 1.0
    ranks = min(pp, _MOST_RANKS)
    num_micro_batches = max(1, round(choice.num_micro_batches * ranks / pp))
    if choice.schedule == "interleaved-1f1b":
        num_micro_batches = -(-num_micro_batches // ranks) * ranks
    # More of them make no more bubble, but for what each waits for messages.
    shape = _shape(
        choice.schedule,
        ranks,
        choice.stages_per_rank,
        min(num_micro_batches, 3 * ranks),
        *(round(seconds / unit_s, _DIGITS) for seconds in (forward_s, inputs_s, weights_s, costs.transfer_s)),
    )
    longer = (pp - 1) / (ranks - 1) if ranks > 1 else 1.0
    in_flight = [
        min(choice.num_micro_batches, pp / ranks * shape.in_flight[stage * ranks // pp])
        for stage in range(pp * choice.stages_per_rank)
    ]
    together = [shape.together[rank * ranks // pp] for rank in range(pp)]
    return unit_s, _Shape(longer * shape.bubble, in_flight, together)


@cache
def _shape(
    schedule: str,
    pp: int,
    stages_per_rank: int,
    num_micro_batches: int,
    forward: float,
    inputs: float,
    weights: float,
    transfer: float,
) -> _Shape:
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
    return _Shape(
        timeline.step_time_s - num_micro_batches * (forward + inputs + weights),
        in_flight,
        [peak / separate for peak, separate in zip(timeline.peak_bytes, of_ranks, strict=True)],
    )


def bytes_of_parameter(precision: Precision, zero: int, dp: int) -> float:
    """Return what a rank holds for each parameter: weight, gradient, and its share of master and moments."""
    if precision == "fp32":
        return 8 + 12 / dp if zero else 16
    weight_and_gradient = 8 if precision == "bf16" else 6
    return weight_and_gradient + 12 / dp
