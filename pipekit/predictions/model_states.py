"""Bytes of weights, gradients, optimizer states and fp32 master weights, as DeepSpeed's optimizers lay them out.

They are counted to the byte under ZeRO 0 and 1, the padding of flattened groups included; under ZeRO 2 and 3 they
follow from a formula.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from typing import Literal

from pipekit.predictions.elements import BYTES_PER_ELEMENT, Precision, Shape, count_elements

_FP32_BYTES = 4
# DeepSpeed fills a flat group up to a multiple of this for each replica: 4 bytes in 16-bit elements.
_ALIGNMENT = 2


Offload = Literal["none", "optimizer", "parameters", "nvme"]
"""States that are kept in host memory, or in files on NVMe, as `parallel.offload` says."""


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
class ModelStates:
    """Bytes of one rank that are there from step to step; reduction and update need no others.

    Attributes:
        weights: in the precision of the run.
        gradients: accumulated in fp32, and the largest gradient of one parameter until it is added to them.
        optimizer_states: moments and step counts.
        masters: fp32 weights beside those of the run.
        host: what is offloaded to host memory, which the others leave out.
        files: what is offloaded to files, likewise.
    """

    weights: int
    gradients: int
    optimizer_states: int
    masters: int
    host: int = field(default=0, kw_only=True)
    files: int = field(default=0, kw_only=True)

    @property
    def standing(self) -> int:
        """Bytes that are there throughout."""
        return self.weights + self.gradients + self.optimizer_states + self.masters


def model_states(
    stages: Sequence[Mapping[str, Shape]],
    *,
    precision: Precision,
    zero: int,
    dp: int,
    states: OptimizerStates,
    frozen: Sequence[Mapping[str, Shape]] = (),
    offload: Offload = "none",
    accumulates: bool = True,
) -> ModelStates:
    """Exact bytes of a rank's model states, where nothing is offloaded.

    Offloaded masters and optimizer states leave the device, with an fp32 gradient for each master and what sums the
    gradients of micro-batches; under ZeRO 3, `parameters` and `nvme` take the weights too. The device then keeps
    gradients in the format of the weights under ZeRO 1, and under ZeRO 2 and 3 none.

    Args:
        stages: the shapes of the trainable parameters of each of its stages, by logical name.
        precision: of the weights.
        zero: ZeRO stage. In 16 bits 0 is 1, as in the engine.
        dp: number of replicas.
        states: tensors of the optimizer.
        frozen: the shapes of the frozen parameters of each stage, which have no other states than their weights.
        offload: what is kept off the device, under ZeRO 1 to 3.
        accumulates: whether a step has several micro-batches.

    Source: `runtime/zero/stage_1_and_2.py`, `stage3.py` and `runtime/bf16_optimizer.py` of DeepSpeed 0.19.8.
    """
    shapes = {name: shape for stage in stages for name, shape in stage.items()}
    groups = _group_sizes(shapes.values())
    is_flat = zero > 0 or precision != "fp32"
    if not is_flat:
        shapes = shapes or {"idle": (1,)}  # which a rank without other parameters has
    num_shard, num_tensors = count_elements(shapes), len(shapes)
    if is_flat:
        multiple = _ALIGNMENT * dp
        flat = [-(-size // multiple) * multiple for size in groups]
        num_tensors, num_shard = len(flat), sum(flat) // dp
    else:
        flat = list(groups)

    num_frozen = count_elements(*frozen)
    if zero == 3:
        num_frozen = -(-num_frozen // dp)
    if zero > 1:
        gradients = _FP32_BYTES * num_shard
    else:
        # One replica without ZeRO leaves accumulation to autograd, and others have flat buffers.
        accumulated = sum(flat) if is_flat or dp > 1 else num_shard
        largest = max(map(prod, shapes.values()), default=0)
        gradients = _FP32_BYTES * accumulated + BYTES_PER_ELEMENT[precision] * largest
    found = ModelStates(
        weights=BYTES_PER_ELEMENT[precision] * ((num_shard if zero == 3 else sum(flat)) + num_frozen),
        gradients=gradients,
        optimizer_states=_FP32_BYTES * (states.per_parameter * num_shard + states.per_tensor * num_tensors),
        masters=_FP32_BYTES * num_shard if is_flat else 0,
    )
    if offload == "none":
        return found
    moved = _FP32_BYTES * (2 + states.per_parameter) * num_shard
    copied = BYTES_PER_ELEMENT[precision] * num_shard
    kept = replace(found, optimizer_states=_FP32_BYTES * states.per_tensor * num_tensors, masters=0, gradients=0)
    if zero == 3:
        moved += gradients
    else:
        # Updated weights go to the device through a copy in their own format, and so come sums over micro-batches.
        moved += copied * ((precision != "fp32") + accumulates)
    if zero < 2:
        kept = replace(kept, gradients=BYTES_PER_ELEMENT[precision] * sum(flat))
    if offloads_weights(offload, zero):
        moved, kept = moved + found.weights, replace(kept, weights=0)
    return replace(kept, files=moved) if offload == "nvme" else replace(kept, host=moved)


def offloads_weights(offload: Offload, zero: int) -> bool:
    """True if the weights are offloaded too, which ZeRO 3 alone allows."""
    return zero == 3 and offload in ("parameters", "nvme")


def bytes_per_parameter(
    *,
    precision: Precision,
    zero: int,
    dp: int,
    states: OptimizerStates = ADAM_STATES,
    offload: Offload = "none",
) -> float:
    """Bytes of model states for each parameter of a rank, without padding, step counts and gradients yet to be added.

    Example:
        >>> bytes_per_parameter(precision="fp32", zero=1, dp=4), bytes_per_parameter(precision="fp16", zero=1, dp=4)
        (11.0, 9.0)
    """
    number = _ALIGNMENT * dp  # which is not padded
    states = OptimizerStates(states.per_parameter, per_tensor=0)
    shapes = [{"weight": (number, 1)}]
    found = model_states(shapes, precision=precision, zero=zero, dp=dp, states=states, offload=offload)
    added = BYTES_PER_ELEMENT[precision] * number if zero < 2 else 0
    return (found.standing - added) / number


def _group_sizes(shapes: Iterable[Shape]) -> list[int]:
    """Number of elements in each of the optimizer's parameter groups: those with weight decay and those without."""
    sizes = [0, 0]
    for shape in shapes:
        sizes[len(shape) < 2] += prod(shape)
    # A rank without parameters has an idle one.
    return [size for size in sizes if size] or [1]
