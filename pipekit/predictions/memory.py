"""What a rank holds at its peak, part by part, as DeepSpeed's optimizers lay it out and the schedule lets it pile up.

Weights, gradients, masters and optimizer states are counted to the byte for AdamW, Adam and SGD under ZeRO 0 and 1, the
padding of flattened groups included. Activations are as exact as what each layer is known to keep, and within a tenth
where split backwards meet checkpointing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from math import prod

from pipekit.errors import LayoutError
from pipekit.predictions.elements import BYTES_PER_ELEMENT, Precision, Shape, count_elements
from pipekit.predictions.layer_costs import LayerCosts, stage_activation_bytes
from pipekit.schedules import Action, Costs, Schedule, Timeline
from pipekit.schedules.messages import EARLY_RECEIVES, plan_messages

_FP32_BYTES = 4
# DeepSpeed fills a flat group up to a multiple of this for each replica: 4 bytes in 16-bit elements.
_ALIGNMENT = 2


@dataclass(frozen=True)
class OptimizerStates:
    """Tensors that an optimizer keeps in fp32, beside a master copy of the weights.

    Attributes:
        per_parameter: numbers for each parameter: the two moments of Adam and AdamW, the momentum of SGD.
        per_tensor: numbers for each tensor of parameters: the step count of Adam and AdamW.
    """

    per_parameter: int
    per_tensor: int


ADAM_STATES = OptimizerStates(per_parameter=2, per_tensor=1)


@dataclass(frozen=True)
class StageContents:
    """What a stage is made of.

    Attributes:
        layers: what each of its layers costs for one micro-batch.
        parameters: the shapes of its trainable parameters by logical name. A tied parameter is in every stage that uses
            it, under one name.
    """

    layers: Sequence[LayerCosts]
    parameters: Mapping[str, Shape]


@dataclass(frozen=True)
class MemoryParts:
    """What one rank holds, in bytes.

    Attributes:
        weights: in the precision of the run.
        gradients: accumulated in fp32; in bf16 also those of one backward, which are there until they are accumulated.
        optimizer_states: moments and step counts.
        masters: fp32 weights beside those of the run.
        activations: what micro-batches under way hold; under checkpointing also the layer that is recomputed.
        logits: what the loss takes for a moment beyond what its backward keeps: in a cross-entropy two gradients of the
            logits in fp32. Zero on all ranks but the last stage's.
        communication: messages that are received ahead, and gradients that are received and sent.
        update: what the reduction over replicas and the update take beyond all but the next three; it is taken when
            activations, logits and messages are gone.
        is_estimate: whether the first four follow from a formula that no engine was held to: ZeRO 2 and 3.
    """

    weights: int
    gradients: int
    optimizer_states: int
    masters: int
    activations: int
    logits: int
    communication: int
    update: int
    is_estimate: bool = False

    @property
    def total(self) -> int:
        """What is held at most: the larger of the times before and after the last backward."""
        standing = self.weights + self.gradients + self.optimizer_states + self.masters
        return standing + max(self.activations + self.logits + self.communication, self.update)


def cut_stages(
    layers: Sequence[LayerCosts], parameters: Sequence[Mapping[str, Shape]], boundaries: Sequence[int]
) -> list[StageContents]:
    """Return what each stage is made of.

    Args:
        layers: what each layer of the model costs.
        parameters: the shapes of each layer's trainable parameters by logical name.
        boundaries: one more layer index than stages.
    """
    return [
        StageContents(
            layers[start:end], {name: shape for layer in parameters[start:end] for name, shape in layer.items()}
        )
        for start, end in pairwise(boundaries)
    ]


def memory_of_ranks(
    stages: Sequence[StageContents],
    schedule: Schedule,
    *,
    loss: LayerCosts | None,
    precision: Precision,
    zero: int,
    dp: int,
    optimizer_states: OptimizerStates = ADAM_STATES,
    checkpointing: bool = False,
) -> list[MemoryParts]:
    """Return what each pipeline rank holds at most in a step, once the optimizer has its states.

    Args:
        stages: all stages of the model, in order.
        schedule: the table of a step; it says which stages are a rank's.
        loss: what the loss costs, as if it were a layer behind the last; None where the last layer returns the loss.
        precision: of weights and activations.
        zero: ZeRO stage. In 16 bits 0 is 1, as in the engine.
        dp: replicas; those of a rank hold as much.
        optimizer_states: those that the optimizer keeps.
        checkpointing: whether only the input of every layer is kept.

    Raises:
        LayoutError: if the schedule has another number of stages.

    Source: `runtime/zero/stage_1_and_2.py` and `runtime/bf16_optimizer.py` of DeepSpeed 0.19.8.

    Example:
        >>> from pipekit.schedules import plan_1f1b
        >>> layer = LayerCosts(20, 40, 40, 40, input_bytes=16, output_bytes=16, saved_bytes=0, keeps_input=True,
        ...     keeps_output=False)
        >>> stages = [StageContents([layer], {f"layers.{i}.weight": (5, 4)}) for i in range(2)]
        >>> first, _ = memory_of_ranks(stages, plan_1f1b(num_stages=2, num_micro_batches=4), loss=None,
        ...     precision="fp32", zero=0, dp=1)
        >>> first.weights, first.gradients, first.optimizer_states, first.activations
        (80, 80, 164, 64)
    """
    if len(stages) != schedule.num_stages:
        raise LayoutError(
            f"{len(stages)} stages do not fit the schedule {schedule.name}, which has {schedule.num_stages}; cut the "
            "layers into as many"
        )
    held = _held_of_one(stages, schedule, loss=loss, checkpointing=checkpointing)
    # From an input gradient to its weight gradient linear layers keep their inputs and the gradients of their outputs:
    # about as much as all layers keep without checkpointing.
    kept = _held_of_one(stages, schedule, loss=loss, checkpointing=False) if checkpointing else held
    more = [max(0, after - before) for after, before in zip(kept, held, strict=True)]
    messages = plan_messages(schedule)
    found = []
    for rank, actions in enumerate(schedule.ranks):
        own = [stages[stage] for stage in schedule.stages_of(rank)]
        if checkpointing:
            activations = _peak_bytes(_count_halves(actions, len(stages)), [*held, *more])
            activations += max(recomputation_bytes(stage.layers) for stage in own)
        else:
            activations = _peak_bytes(actions, held)
        is_last = schedule.placement[-1] == rank
        found.append(
            replace(
                _standing(own, precision=precision, zero=zero, dp=dp, states=optimizer_states),
                activations=activations,
                # A gradient of what the loss keeps, and one of what it made that of.
                logits=2 * loss.saved_bytes if loss is not None and is_last else 0,
                communication=_communication(stages, messages, rank),
            )
        )
    return found


def recomputation_bytes(layers: Iterable[LayerCosts]) -> int:
    """Return what the recomputation of one layer holds at most, beside the layer's input."""
    return max(layer.saved_bytes + (layer.output_bytes if layer.keeps_output else 0) for layer in layers)


def _standing(
    own: Sequence[StageContents], *, precision: Precision, zero: int, dp: int, states: OptimizerStates
) -> MemoryParts:
    """Return what is there whatever the schedule, and the update; nothing of what passes."""
    shapes = {name: shape for stage in own for name, shape in stage.parameters.items()}
    num_gradients = count_elements(shapes)
    groups = _group_sizes(shapes.values())
    is_flat = zero > 0 or precision != "fp32"
    if is_flat:
        multiple = _ALIGNMENT * dp
        flat = [-(-size // multiple) * multiple for size in groups]
        num_tensors, num_shard = len(flat), sum(flat) // dp
    else:
        # An idle parameter gets no gradient, and so no states.
        flat, num_tensors, num_shard = groups, len(shapes), num_gradients
    num_weights = num_shard if zero == 3 else sum(flat)

    gradients, of_one_backward = _FP32_BYTES * num_gradients, 0
    if zero > 1:
        gradients = _FP32_BYTES * num_shard
    elif precision == "bf16":
        # A flat fp32 buffer, to which each backward's own gradients are added after it.
        of_one_backward = BYTES_PER_ELEMENT[precision] * max(count_elements(stage.parameters) for stage in own)
        gradients = _FP32_BYTES * sum(flat) + of_one_backward
    update = 0
    if dp > 1 and zero < 2:
        # All gradients once more, flattened to be summed over the replicas.
        update = max(0, _FP32_BYTES * num_gradients - of_one_backward)
    elif is_flat and precision != "bf16" and zero < 2:
        # Each group's gradients are flattened and then freed; those of the groups before it are gone.
        update = max(_FP32_BYTES * (size - sum(groups[:index])) for index, size in enumerate(flat))
    return MemoryParts(
        weights=BYTES_PER_ELEMENT[precision] * num_weights,
        gradients=gradients,
        optimizer_states=_FP32_BYTES * (states.per_parameter * num_shard + states.per_tensor * num_tensors),
        masters=_FP32_BYTES * num_shard if is_flat else 0,
        activations=0,
        logits=0,
        communication=0,
        update=update,
        is_estimate=zero > 1,
    )


def _group_sizes(shapes: Iterable[Shape]) -> list[int]:
    """Return the elements of each of the optimizer's parameter groups: what decays and what does not."""
    sizes = [0, 0]
    for shape in shapes:
        sizes[len(shape) < 2] += prod(shape)
    # A rank without parameters has an idle one.
    return [size for size in sizes if size] or [1]


def _held_of_one(
    stages: Sequence[StageContents], schedule: Schedule, *, loss: LayerCosts | None, checkpointing: bool
) -> list[int]:
    """Return what each stage holds of one micro-batch from its forward to its backward."""
    held = [stage_activation_bytes(stage.layers, checkpointing=checkpointing) for stage in stages]
    if checkpointing:
        for stage, contents in enumerate(stages):
            # Where a layer's backward keeps nothing there is nothing to recompute, and its input is not kept either.
            pairs = pairwise(contents.layers)
            held[stage] -= sum(before.output_bytes for before, layer in pairs if not _keeps_anything(layer))
    if loss is not None:
        last = stages[-1].layers[-1]
        is_kept = loss.keeps_input or (last.keeps_output and not checkpointing)
        held[-1] += loss.saved_bytes + loss.output_bytes - (0 if is_kept else last.output_bytes)
    for stage, (before, rank) in enumerate(pairwise(schedule.placement), start=1):
        if before == rank:
            # What one stage passes on is what the next is passed: the same tensor.
            held[stage] -= stages[stage].layers[0].input_bytes
    return held


def _keeps_anything(layer: LayerCosts) -> bool:
    return layer.saved_bytes > 0 or layer.keeps_input or layer.keeps_output


def _peak_bytes(actions: Sequence[Action], held: Sequence[float]) -> int:
    """Return what a rank holds at most that does these actions."""
    seconds = [0.0] * len(held)
    costs = Costs(seconds, seconds, seconds, activation_bytes=held)
    return int(Timeline(Schedule("", 0, (tuple(actions),)), spans=(), costs=costs).peak_bytes[0])


def _count_halves(actions: Sequence[Action], num_stages: int) -> list[Action]:
    """Return a rank's actions with a second stage for each that splits its backwards, held from half to half."""
    row: list[Action] = []
    for action in actions:
        second = action.stage + num_stages
        if action.kind == "I":
            row.append(Action(second, "F", action.micro_batch))
        else:
            row.append(action)
            if action.kind == "W":
                row.append(Action(second, "W", action.micro_batch))
    return row


def _communication(
    stages: Sequence[StageContents], messages: Mapping[tuple[int, int], Sequence[Action]], pipe_rank: int
) -> int:
    def size(action: Action) -> int:
        # An activation is the input of the stage above; a gradient is that of its own stage's input.
        stage = action.stage + 1 if action.kind == "F" else action.stage
        return stages[stage].layers[0].input_bytes

    ahead, received, sent = 0, [0], [0]
    for (source, target), passed in messages.items():
        if pipe_rank not in (source, target):
            continue
        gradients = [size(action) for action in passed if action.kind != "F"]
        if target == pipe_rank:
            sizes = [size(action) for action in passed]
            ahead += max(sum(sizes[first : first + EARLY_RECEIVES]) for first in range(len(sizes)))
            received += gradients
        else:
            sent += gradients
    return ahead + max(received) + max(sent)
