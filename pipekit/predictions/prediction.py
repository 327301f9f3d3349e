"""What a run takes under one layout: the time of a step, and what every rank computes and holds."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from pipekit.layout import Layout
from pipekit.partitioners import balanced_boundaries
from pipekit.predictions.devices import Device
from pipekit.predictions.elements import Precision, Shape, count_elements
from pipekit.predictions.layer_costs import layer_flops, layer_seconds
from pipekit.predictions.memory import ADAM_STATES, MemoryParts, OptimizerStates, cut_stages, memory_of_ranks
from pipekit.predictions.model_costs import ModelCosts, stage_extras
from pipekit.predictions.sharding import shard_layers
from pipekit.predictions.timing import Cluster, StepTimes, stage_costs, step_times
from pipekit.schedules import SCHEDULE_NAMES, Schedule, plan_schedule

# A table of more actions is planned for fewer micro-batches: a step grows by the same with each beyond some.
_MOST_ACTIONS = 4_000


@dataclass(frozen=True)
class Choice:
    """One way to lay a run out.

    Attributes:
        layout: the grid of ranks.
        zero: ZeRO stage.
        schedule: its name, or the path of a table.
        stages_per_rank: stages on each pipeline rank.
        micro_batch_size: sequences that one rank computes at a time.
        num_micro_batches: micro-batches of a step on each pipeline.
        checkpointing: whether only the inputs of layers are kept for the backward.
        max_in_flight: for `auto`, the stage activations that a rank may hold.
    """

    layout: Layout
    zero: int
    schedule: str
    stages_per_rank: int
    micro_batch_size: int
    num_micro_batches: int
    checkpointing: bool
    max_in_flight: int | None = None

    @property
    def global_batch_size(self) -> int:
        """Sequences of a step."""
        return self.micro_batch_size * self.num_micro_batches * self.layout.dp

    def __str__(self) -> str:
        stages = f" x {self.stages_per_rank}" if self.stages_per_rank > 1 else ""
        kept = ", checkpointing" if self.checkpointing else ""
        batches = "micro-batch" if self.num_micro_batches == 1 else "micro-batches"
        return (
            f"{self.layout}, ZeRO {self.zero}, {self.schedule}{stages}, {self.num_micro_batches:,} {batches} of "
            f"{self.micro_batch_size}{kept}"
        )


@dataclass(frozen=True)
class PlannedModel:
    """A model as far as predictions need it.

    Attributes:
        costs_of: returns what its layers cost for a micro-batch of so many sequences.
        shapes_of: returns the shapes of each layer's trainable parameters by logical name, as one rank of so many
            tensor-parallel ones has them.
        layer_names: logical name of each layer.
        sequence_length: tokens of a sequence.
        precision: of weights and activations.
        optimizer_states: tensors that its optimizer keeps.
        is_timed: whether `costs_of` tells measured seconds too.
    """

    costs_of: Callable[[int], ModelCosts]
    shapes_of: Callable[[int], Sequence[Mapping[str, Shape]]]
    layer_names: Sequence[str]
    sequence_length: int
    precision: Precision
    optimizer_states: OptimizerStates = ADAM_STATES
    is_timed: bool = False

    @property
    def num_parameters(self) -> int:
        """Trainable parameters, tied ones once."""
        return count_elements(*self.shapes_of(1))

    @property
    def layer_parameters(self) -> list[int]:
        """Trainable parameters of each layer; a tied layer's wherever it occurs."""
        return [count_elements(layer) for layer in self.shapes_of(1)]


@dataclass(frozen=True)
class RankPrediction:
    """What one pipeline rank does and holds; its replicas and tensor-parallel peers do and hold as much.

    Attributes:
        stages: the layers of each of its stages.
        parameters: trainable ones, on one tensor-parallel rank, tied ones once.
        memory: what it holds at most.
        time_s: seconds of a step in which it computes.
    """

    stages: tuple[range, ...]
    parameters: int
    memory: MemoryParts
    time_s: float


@dataclass(frozen=True)
class Prediction:
    """What a run takes under one layout.

    Attributes:
        choice: the layout.
        num_parameters: trainable parameters of the model, tied ones once.
        boundaries: stage `s` holds layers `boundaries[s]` to `boundaries[s + 1] - 1`.
        ranks: one for each pipeline rank.
        times: the step.
        tokens_per_s: of the whole run.
        tflops_per_device: operations per second of each device, in 10^12, those of recomputation counted.
    """

    choice: Choice
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
        """What the fullest rank holds at most."""
        return max(rank.memory.total for rank in self.ranks)


def plan_tables(choice: Choice) -> tuple[Schedule, Schedule | None]:
    """Return the table of a step, or, where that has very many actions, those of two steps with fewer micro-batches.

    Returns:
        The table, and where it leaves micro-batches out, one with still fewer: one for each pipeline rank.

    Raises:
        ConfigError: if the schedule cannot run so.
    """
    pp, num_micro_batches = choice.layout.pp, choice.num_micro_batches
    # What is left out is a multiple of the ranks, as interleaving asks.
    fewer = 3 * pp + num_micro_batches % pp
    is_long = num_micro_batches > fewer and num_micro_batches * actions_of_micro_batch(choice) > _MOST_ACTIONS
    # Under GPipe every micro-batch more is held, and a file has the micro-batches that it has.
    if not is_long or choice.schedule == "gpipe" or choice.schedule not in SCHEDULE_NAMES:
        return _plan_table(choice, num_micro_batches), None
    return _plan_table(choice, fewer), _plan_table(choice, fewer - pp)


def actions_of_micro_batch(choice: Choice) -> int:
    """Return how many actions a table has for each micro-batch, at most."""
    return 3 * choice.layout.pp * choice.stages_per_rank


def _plan_table(choice: Choice, num_micro_batches: int) -> Schedule:
    return plan_schedule(
        choice.schedule,
        pp=choice.layout.pp,
        num_micro_batches=num_micro_batches,
        stages_per_rank=choice.stages_per_rank,
        max_in_flight=choice.max_in_flight,
    )


def balance(model: PlannedModel, choice: Choice, placement: Sequence[int]) -> list[int]:
    """Return the boundaries that balance the ranks' seconds, or their operations where nothing was measured."""
    costs = model.costs_of(choice.micro_batch_size)
    cost = layer_seconds if costs.is_measured else layer_flops
    extras = stage_extras(costs, len(placement), cost)
    return balanced_boundaries([cost(layer) for layer in costs.layers], placement, stage_extras=extras)


def predict(
    model: PlannedModel, choice: Choice, device: Device, *, boundaries: Sequence[int] | None = None
) -> Prediction:
    """Return what a run takes under one layout.

    Args:
        model: what is trained.
        choice: the layout.
        device: what each rank computes on.
        boundaries: of the stages; those that balance the ranks unless given.

    Raises:
        PipekitError: if the layout cannot run; it says why.
    """
    schedule, shorter = plan_tables(choice)
    costs = model.costs_of(choice.micro_batch_size)
    cut = tuple(balance(model, choice, schedule.placement) if boundaries is None else boundaries)
    tp, dp = choice.layout.tp, choice.layout.dp
    cluster = Cluster(device, choice.layout)
    stages = cut_stages(shard_layers(costs.layers, tp), model.shapes_of(tp), cut)
    loss = None if costs.loss is None else shard_layers([costs.loss], tp)[0]
    stage_parameters = [count_elements(stage.parameters) for stage in stages]
    times = step_times(
        schedule,
        choice.num_micro_batches,
        stage_costs(
            costs.layers,
            cut,
            cluster,
            precision=model.precision,
            checkpointing=choice.checkpointing,
            loss=costs.loss,
        ),
        cluster,
        stage_parameters=stage_parameters,
        precision=model.precision,
        zero=choice.zero,
        shorter=shorter,
    )
    layers = [range(start, end) for start, end in pairwise(cut)]
    memory = memory_of_ranks(
        stages,
        schedule,
        loss=loss,
        precision=model.precision,
        zero=choice.zero,
        dp=dp,
        optimizer_states=model.optimizer_states,
        checkpointing=choice.checkpointing,
    )
    ranks = []
    for rank in range(choice.layout.pp):
        own = schedule.stages_of(rank)
        ranks.append(
            RankPrediction(
                stages=tuple(layers[stage] for stage in own),
                parameters=count_elements(*(stages[stage].parameters for stage in own)),
                memory=memory[rank],
                time_s=times.busy_s[rank],
            )
        )
    everything = [*costs.layers, *([] if costs.loss is None else [costs.loss])]
    flops = sum(layer.flops + (layer.forward_flops if choice.checkpointing else 0) for layer in everything)
    num_flops = flops * choice.num_micro_batches * dp
    return Prediction(
        choice=choice,
        num_parameters=model.num_parameters,
        boundaries=cut,
        ranks=tuple(ranks),
        times=times,
        tokens_per_s=choice.global_batch_size * model.sequence_length / times.step_time_s,
        tflops_per_device=num_flops / choice.layout.world_size / times.step_time_s / 1e12,
    )
