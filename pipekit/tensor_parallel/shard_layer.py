"""Cutting a layer that was built whole."""

from __future__ import annotations

from torch import nn

from pipekit.errors import LayoutError
from pipekit.tensor_parallel.group import TensorGroup
from pipekit.tensor_parallel.layers import TensorParallelModule
from pipekit.tensor_parallel.shards import mark_partial_gradient, replacement_of, shard_of


def shard_layer(layer: nn.Module, group: TensorGroup, *, sequence_parallel: bool) -> None:
    """Keep this rank's part of a whole layer, in place.

    Parameters outside tensor-parallel modules stay whole. In a layer that works on parts of the sequence their
    gradients are partial, since each rank applies them to its own part.

    Args:
        layer: built whole, with its initial weights.
        group: the tensor-parallel peers.
        sequence_parallel: whether the layer works on this rank's part of the sequence; see `SequenceFlow`.

    Raises:
        LayoutError: if a module has less to share out than there are ranks, or shares what is cut with one that is not.
    """
    for module in list(layer.modules()):
        if isinstance(module, TensorParallelModule):
            module.shard(group, sequence_parallel=sequence_parallel)
    for path, parameter in layer.named_parameters(remove_duplicate=False):
        if replacement_of(parameter) is not None:
            raise LayoutError(
                f"{type(layer).__name__}.{path} is shared with a module that parallel.tp={group.size} cuts, and is not "
                "cut itself; use tensor-parallel modules for both, or parameters of their own"
            )
    if sequence_parallel:
        for parameter in layer.parameters():
            if shard_of(parameter) is None:
                mark_partial_gradient(parameter)
