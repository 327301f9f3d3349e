"""Whether a layer takes and returns the whole sequence, or this rank's part of it."""

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
    """What a layer takes and returns under sequence parallelism.

    A layer says so by a class attribute `sequence_flow`, or the `forward_fn` of a tied layer by an attribute of the
    function. One that says nothing takes and returns the whole sequence.

    Attributes:
        takes_shard: whether it takes `(B, S / tp, ...)`, this rank's part of the sequence.
        returns_shard: whether it returns this rank's part.
    """

    takes_shard: bool = False
    returns_shard: bool = False

    @property
    def works_on_shard(self) -> bool:
        """Whether what the layer computes outside its tensor-parallel modules is on this rank's part."""
        return self.takes_shard or self.returns_shard


WHOLE = SequenceFlow()
SHARDED = SequenceFlow(takes_shard=True, returns_shard=True)


def flow_of(layer: Callable[..., Any]) -> SequenceFlow:
    """Return how a layer, or the `forward_fn` of a tied one, deals with the sequence."""
    flow: SequenceFlow = getattr(layer, "sequence_flow", WHOLE)
    return flow


def convert(activations: Any, *, is_shard: bool, wants_shard: bool, group: TensorGroup | None) -> Any:
    """Return activations as the next layer takes them.

    Floating-point tensors of three dimensions, `(B, S, D)`, are joined or split along the sequence; others, such as
    token ids and masks, are whole everywhere.

    Args:
        activations: what the layer before has returned.
        is_shard: whether that is this rank's part of the sequence.
        wants_shard: whether the next layer takes this rank's part.
        group: the tensor-parallel peers.
    """
    if group is None or is_shard == wants_shard:
        return activations
    change = split_sequence if wants_shard else gather_sequence
    tensors, structure = flatten(activations, "what a layer has returned")
    return unflatten([change(tensor, group) if has_sequence(tensor) else tensor for tensor in tensors], structure)


def has_sequence(tensor: Tensor) -> bool:
    """Return whether what passes between layers is taken to be along the sequence."""
    return tensor.ndim == 3 and tensor.is_floating_point()
