"""Sequence parallelism between layers: activations with the whole sequence, or with this rank's shard of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from pipekit.tensor_parallel.collectives import gather_sequence, split_sequence
from pipekit.tensor_parallel.group import TensorGroup
from pipekit.tensors.nested import flatten, unflatten


@dataclass(frozen=True)
class SequenceFlow:
    """Sequence flow of a layer under sequence parallelism: its input and output are the whole sequence, or a shard.

    A layer declares it in a class attribute `sequence_flow`, and the `forward_fn` of a tied layer in an attribute of
    the function. By default a layer takes and returns the whole sequence.

    Attributes:
        takes_shard: True if it takes `(B, S / tp, ...)`, this rank's shard of the sequence.
        returns_shard: True if it returns this rank's shard.
    """

    takes_shard: bool = False
    returns_shard: bool = False

    @property
    def works_on_shard(self) -> bool:
        """True if the layer works on this rank's shard outside its tensor-parallel modules."""
        return self.takes_shard or self.returns_shard


WHOLE = SequenceFlow()
SHARDED = SequenceFlow(takes_shard=True, returns_shard=True)


def flow_of(layer: Callable[..., Any]) -> SequenceFlow:
    """Return the sequence flow of a layer, or of a tied layer's `forward_fn`."""
    flow: SequenceFlow = getattr(layer, "sequence_flow", WHOLE)
    return flow


def convert(activations: Any, *, is_shard: bool, wants_shard: bool, group: TensorGroup | None) -> Any:
    """Convert activations to the form that the next layer takes.

    Floating-point tensors of three dimensions, `(B, S, D)`, are gathered or split along the sequence; other tensors,
    such as token ids and masks, are always whole.
    """
    if group is None or is_shard == wants_shard:
        return activations
    change = split_sequence if wants_shard else gather_sequence
    tensors, structure = flatten(activations, "the output of a layer")
    return unflatten([change(tensor, group) if has_sequence(tensor) else tensor for tensor in tensors], structure)


def has_sequence(tensor: Tensor) -> bool:
    """True if an activation between layers has a sequence dimension: `(B, S, D)`, floating point."""
    return tensor.ndim == 3 and tensor.is_floating_point()
