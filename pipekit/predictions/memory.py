"""Peak memory of each rank: exact, and bounded from above.

Weights, gradients, masters and optimizer states come from `model_states`. Activations are as exact as what each layer
is known to keep, and within a tenth where split backwards meet checkpointing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate, pairwise
from math import ceil

from pipekit.errors import LayoutError
from pipekit.partitioners import MemoryLimit
from pipekit.predictions.elements import BYTES_PER_ELEMENT, Precision, Shape
from pipekit.predictions.layer_costs import LayerCosts, ModelCosts, stage_activation_bytes, stage_host_bytes
from pipekit.predictions.model_states import (
    ADAM_STATES,
    ModelStates,
    Offload,
    OptimizerStates,
    bytes_per_parameter,
    model_states,
    offloads_weights,
)
from pipekit.schedules import Action, Costs, Schedule, Timeline
from pipekit.schedules.operations import POSTED_AHEAD, Operation, most_posted, plan_operations


@dataclass(frozen=True)
class StageContents:
    """Layers and parameters of a stage.

    Attributes:
        layers: costs of each of its layers for one micro-batch.
        parameters: the shapes of its trainable parameters by logical name. A tied parameter is in every stage that uses
            it, under one name.
        frozen: the shapes of its frozen parameters.
    """

    layers: Sequence[LayerCosts]
    parameters: Mapping[str, Shape]
    frozen: Mapping[str, Shape] = field(default_factory=dict)


@dataclass(frozen=True)
class MemoryParts(ModelStates):
    """Peak memory of one rank by parts, in bytes.

    Attributes:
        activations: those of micro-batches in flight; under checkpointing also the layer that is recomputed.
        host_activations: inputs of recomputed layers that are kept in host memory, which the total leaves out.
        logits: temporary tensors of the loss: in a cross-entropy two gradients of the logits in fp32. Zero on all ranks
            but the last stage's.
        communication: messages that are received early, and gradients that are received and sent.
    """

    activations: int
    logits: int
    communication: int
    host_activations: int = 0

    @property
    def total(self) -> int:
        """Peak memory of the device."""
        return self.standing + self.activations + self.logits + self.communication


def stage_contents(
    layers: Sequence[LayerCosts],
    parameters: Sequence[Mapping[str, Shape]],
    boundaries: Sequence[int],
    *,
    frozen: Sequence[Mapping[str, Shape]] = (),
) -> list[StageContents]:
    """Layers, parameters and frozen parameters of each stage, from those of each layer of the model."""

    def join(shapes: Sequence[Mapping[str, Shape]]) -> dict[str, Shape]:
        return {name: shape for layer in shapes for name, shape in layer.items()}

    return [
        StageContents(layers[start:end], join(parameters[start:end]), join(frozen[start:end]))
        for start, end in pairwise(boundaries)
    ]


def peak_memory(
    stages: Sequence[StageContents],
    schedule: Schedule,
    *,
    loss: LayerCosts | None,
    precision: Precision,
    zero: int,
    dp: int,
    optimizer_states: OptimizerStates = ADAM_STATES,
    offload: Offload = "none",
) -> list[MemoryParts]:
    """Peak memory of each pipeline rank in a step, once the optimizer has its states.

    Args:
        stages: all stages of the model, in order.
        schedule: the table of a step; it says which stages are a rank's.
        loss: costs of the loss, as if it were a layer behind the last; None where the last layer returns the loss.
        precision: of weights and activations.
        zero: ZeRO stage. In 16 bits 0 is 1, as in the engine.
        dp: number of replicas.
        optimizer_states: those that the optimizer keeps.
        offload: the states that are kept off the device.

    Raises:
        LayoutError: if the schedule has another number of stages.

    Example:
        >>> from pipekit.schedules import plan_1f1b
        >>> layer = LayerCosts(20, 40, 40, 40, input_bytes=16, output_bytes=16, saved_bytes=0, keeps_input=True,
        ...     keeps_output=False)
        >>> stages = [StageContents([layer], {f"layers.{i}.weight": (5, 4)}) for i in range(2)]
        >>> first, _ = peak_memory(stages, plan_1f1b(num_stages=2, num_micro_batches=4), loss=None,
        ...     precision="fp32", zero=0, dp=1)
        >>> first.weights, first.gradients, first.optimizer_states, first.activations
        (80, 160, 164, 64)
    """
    if len(stages) != schedule.num_stages:
        raise LayoutError(
            f"{len(stages)} stages do not fit the schedule {schedule.name}, which has {schedule.num_stages}; divide "
            "the layers among as many"
        )
    held = _activation_bytes(stages, schedule, loss=loss)
    # From an input gradient to its weight gradient linear layers keep their inputs and the gradients of their outputs:
    # about as much as all layers keep without checkpointing.
    kept = _activation_bytes([_never_recomputed(stage) for stage in stages], schedule, loss=loss)
    more = [max(0, after - before) for after, before in zip(kept, held, strict=True)]
    hosted = [stage_host_bytes(stage.layers) for stage in stages]
    operations = plan_operations(schedule, ahead=POSTED_AHEAD)
    found = []
    for rank, actions in enumerate(schedule.ranks):
        own = [stages[stage] for stage in schedule.stages_of(rank)]
        activations = _peak_bytes(_count_halves(actions, len(stages)), [*held, *more])
        activations += max(recomputation_bytes(stage.layers) for stage in own)
        is_last = schedule.placement[-1] == rank
        states = model_states(
            [stage.parameters for stage in own],
            precision=precision,
            zero=zero,
            dp=dp,
            states=optimizer_states,
            frozen=[stage.frozen for stage in own],
            offload=offload,
            accumulates=schedule.num_micro_batches > 1,
        )
        found.append(
            MemoryParts(
                **vars(states),
                activations=activations,
                # A gradient of what the loss keeps, and one of what it made that of.
                logits=2 * loss.saved_bytes if loss is not None and is_last else 0,
                communication=_communication(stages, operations[rank]),
                host_activations=_peak_bytes(actions, hosted),
            )
        )
    return found


def memory_limit(
    costs: ModelCosts,
    schedule: Schedule,
    *,
    precision: Precision,
    zero: int,
    dp: int,
    optimizer_states: OptimizerStates,
    limit_bytes: int,
    frozen_parameters: Sequence[int] = (),
    offload: Offload = "none",
) -> MemoryLimit:
    """Upper bounds on the memory of layers and stages, which add up to one for each rank, and the limit of a rank.

    Options are those of `peak_memory`; costs are for one micro-batch. `frozen_parameters` are counts, one a layer.
    """
    frozen = frozen_parameters or [0] * len(costs.layers)
    is_away = offloads_weights(offload, zero)
    frozen_bytes = 0 if is_away else BYTES_PER_ELEMENT[precision] / (dp if zero == 3 else 1)
    per_parameter = bytes_per_parameter(precision=precision, zero=zero, dp=dp, states=optimizer_states, offload=offload)
    in_flight = schedule.peak_of_stages()
    largest_input = max(layer.input_bytes for layer in costs.layers)
    largest_gradient = BYTES_PER_ELEMENT[precision] * max(layer.parameters for layer in costs.layers)
    posted = [most_posted(operations) for operations in plan_operations(schedule, ahead=POSTED_AHEAD)]
    recomputed = recomputation_bytes(costs.layers)
    # The input of a stage for each micro-batch, what is received early, a gradient received and one sent, and the
    # weight gradients of a layer that are yet to be added to those accumulated.
    extras = [
        (number + posted[rank] + 2) * largest_input + recomputed + largest_gradient
        for number, rank in zip(in_flight, schedule.placement, strict=True)
    ]

    def activation_bytes(layer: LayerCosts) -> int:
        # What is recomputed for an input gradient stays until the weight gradient.
        if not layer.is_recomputed or schedule.split_backwards:
            return layer.output_bytes + layer.saved_bytes
        return layer.input_bytes if layer.apart_bytes is None else layer.apart_bytes

    if costs.loss is not None:
        extras[-1] += (in_flight[-1] + 2) * costs.loss.saved_bytes
    return MemoryLimit(
        state_bytes=[
            ceil(per_parameter * layer.parameters + frozen_bytes * number)
            for layer, number in zip(costs.layers, frozen, strict=True)
        ],
        activation_bytes=list(map(activation_bytes, costs.layers)),
        in_flight=in_flight,
        extra_bytes=extras,
        limit_bytes=limit_bytes,
    )


def recomputation_bytes(layers: Iterable[LayerCosts]) -> int:
    """Peak memory of the recomputation of one layer, beside what is kept for it."""

    def peak(layer: LayerCosts) -> int:
        if not layer.is_recomputed:
            return layer.core_bytes
        return layer.fetched_bytes + layer.saved_bytes + (layer.output_bytes if layer.keeps_output else 0)

    return max(map(peak, layers))


def _never_recomputed(stage: StageContents) -> StageContents:
    return replace(stage, layers=[replace(layer, is_recomputed=False, apart_bytes=None) for layer in stage.layers])


def _activation_bytes(stages: Sequence[StageContents], schedule: Schedule, *, loss: LayerCosts | None) -> list[int]:
    """Bytes of activations of one micro-batch in each stage, from its forward to its backward."""
    held = [stage_activation_bytes(stage.layers) for stage in stages]
    if loss is not None:
        last = stages[-1].layers[-1]
        is_kept = loss.keeps_input or (last.keeps_output and not last.is_recomputed)
        held[-1] += loss.saved_bytes + loss.output_bytes - (0 if is_kept else last.output_bytes)
    for stage, (before, rank) in enumerate(pairwise(schedule.placement), start=1):
        if before == rank:
            # What one stage passes on is what the next is passed: the same tensor.
            held[stage] -= stages[stage].layers[0].input_bytes
    return held


def _peak_bytes(actions: Sequence[Action], held: Sequence[float]) -> int:
    """Peak of the activations of a rank that does these actions."""
    seconds = [0.0] * len(held)
    costs = Costs(seconds, seconds, seconds, activation_bytes=held)
    return int(Timeline(Schedule("", 0, (tuple(actions),)), spans=(), costs=costs).peak_bytes[0])


def _count_halves(actions: Sequence[Action], num_stages: int) -> list[Action]:
    """Actions of a rank, with a second stage for each that splits its backwards, in flight between the two halves."""
    row: list[Action] = []
    for action in actions:
        if action.kind != "I":
            row.append(action)
        if action.kind in "IW":
            row.append(Action(action.stage + num_stages, "F" if action.kind == "I" else "W", action.micro_batch))
    return row


def _communication(stages: Sequence[StageContents], operations: Sequence[Operation]) -> int:
    """Peak of the receives that are posted, and the largest gradients that are received and sent."""

    def size(action: Action) -> int:
        # An activation is the input of the stage above; a gradient is that of its own stage's input.
        stage = action.stage + 1 if action.kind == "F" else action.stage
        return stages[stage].layers[0].input_bytes

    changes = {"post": 1, "receive": -1}
    sizes = [(each, size(each.action)) for each in operations if each.peer is not None]
    posted = accumulate(changes.get(each.kind, 0) * num_bytes for each, num_bytes in sizes)
    gradients: dict[str, int] = {}
    for each, num_bytes in sizes:
        if each.action.kind != "F":
            gradients[each.kind] = max(gradients.get(each.kind, 0), num_bytes)
    return max(posted, default=0) + gradients.get("receive", 0) + gradients.get("send", 0)
