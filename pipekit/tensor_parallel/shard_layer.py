"""Sharding of a layer that was built whole."""

from __future__ import annotations

from torch import nn

from pipekit.errors import LayoutError
from pipekit.tensor_parallel.group import TensorGroup
from pipekit.tensor_parallel.layers import TensorParallelModule
from pipekit.tensor_parallel.shards import mark_partial_gradient, replacement_of, shard_of


def shard_layer(layer: nn.Module, group: TensorGroup, *, sequence_parallel: bool) -> None:
    """Shard a layer that was built whole, in place: keep only this rank's shard.

    Parameters outside tensor-parallel modules stay whole. With `sequence_parallel`, in a layer that works on shards of
    the sequence (see `SequenceFlow`), their gradients are partial, because each rank applies them to its own shard.

    Raises:
        LayoutError: if a module is too small for the number of ranks, or shares a parameter with one that is not
            sharded.
    """
    for module in list(layer.modules()):
        if isinstance(module, TensorParallelModule):
            module.shard(group, sequence_parallel=sequence_parallel)
    for path, parameter in layer.named_parameters(remove_duplicate=False):
        if replacement_of(parameter) is not None:
            raise LayoutError(
                f"{type(layer).__name__}.{path} is shared with a module that parallel.tp={group.size} shards, and is "
                "not sharded itself; use tensor-parallel modules for both, or parameters of their own"
            )
    if sequence_parallel:
        for parameter in layer.parameters():
            if shard_of(parameter) is None:
                mark_partial_gradient(parameter)
