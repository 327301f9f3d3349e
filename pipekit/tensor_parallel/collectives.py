"""Collectives of the tensor group, with their gradients.

Between layers, either an activation is whole and equal on all tensor ranks, or each rank has its shard of the sequence.
The gradient of a whole activation is whole on every rank; the gradient of a shard is that of the shard.

Source: Shoeybi et al. 2019, "Megatron-LM", section 3 (`f` and `g`); Korthikanti et al. 2022, "Reducing Activation
Recomputation in Large Transformer Models", section 4.2.1 (their counterparts along the sequence).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pipekit.errors import LayoutError
from pipekit.tensor_parallel.group import TensorGroup
from pipekit.tensor_parallel.shards import shard_bounds

SEQUENCE_DIM = 1
"""Activations are `(B, S, ...)`."""

Exchange = Callable[[Tensor, TensorGroup], Tensor]


class _Exchange(torch.autograd.Function):
    """One exchange in the forward, and the one that belongs to it in the backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: TensorGroup, forward: Exchange, backward: Exchange) -> Tensor:
        ctx.group, ctx.exchange = group, backward
        return forward(x, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.exchange(grad, ctx.group), None, None, None


def _exchange(x: Tensor, group: TensorGroup | None, forward: Exchange, backward: Exchange) -> Tensor:
    return x if group is None else _Exchange.apply(x, group, forward, backward)  # type: ignore[no-untyped-call]


def _keep(x: Tensor, group: TensorGroup) -> Tensor:
    return x.view_as(x)


def _sum(x: Tensor, group: TensorGroup) -> Tensor:
    return group.all_reduce(x.clone())


def _gather(x: Tensor, group: TensorGroup) -> Tensor:
    return group.all_gather(x, SEQUENCE_DIM)


def _reduce_scatter(x: Tensor, group: TensorGroup) -> Tensor:
    check_divisible(x.shape[SEQUENCE_DIM], group)
    return group.reduce_scatter(x, SEQUENCE_DIM)


def _own_shard(x: Tensor, group: TensorGroup) -> Tensor:
    check_divisible(x.shape[SEQUENCE_DIM], group)
    first, last = shard_bounds(x.shape[SEQUENCE_DIM], group.rank, group.size)
    return x.narrow(SEQUENCE_DIM, first, last - first).contiguous()


def check_divisible(sequence_length: int, group: TensorGroup) -> None:
    """Raise a `LayoutError` if a sequence cannot be split into equal shards."""
    if sequence_length % group.size:
        raise LayoutError(
            f"a sequence of {sequence_length} tokens cannot be split into {group.size} equal shards for sequence "
            f"parallelism; pad it to {-(-sequence_length // group.size) * group.size}, or set "
            "parallel.sequence_parallel=false"
        )


def copy_to_shards(x: Tensor, group: TensorGroup | None) -> Tensor:
    """Return `x` for a computation that is sharded over the group; the gradient is summed over the group."""
    return _exchange(x, group, _keep, _sum)


def sum_partials(x: Tensor, group: TensorGroup | None) -> Tensor:
    """Sum the partial results `x` over the group; the sum is whole on every rank."""
    return _exchange(x, group, _sum, _keep)


def reduce_scatter_sequence(x: Tensor, group: TensorGroup | None) -> Tensor:
    """Sum partial results `x` `(B, S, ...)` over the group, and return this rank's shard `(B, S / tp, ...)` of the sum.

    Raises:
        LayoutError: if the sequence cannot be split into equal shards.
    """
    return _exchange(x, group, _reduce_scatter, _gather)


def gather_sequence_for_shards(x: Tensor, group: TensorGroup | None) -> Tensor:
    """Gather the sequence `(B, S, ...)` from shards `(B, S / tp, ...)`, for a computation sharded over the group."""
    return _exchange(x, group, _gather, _reduce_scatter)


def gather_sequence(x: Tensor, group: TensorGroup | None) -> Tensor:
    """Gather the sequence `(B, S, ...)` from shards `(B, S / tp, ...)`, for a computation that all ranks repeat."""
    return _exchange(x, group, _gather, _own_shard)


def split_sequence(x: Tensor, group: TensorGroup | None) -> Tensor:
    """Return this rank's shard `(B, S / tp, ...)` of a sequence `(B, S, ...)` that is the same on all ranks.

    Raises:
        LayoutError: if the sequence cannot be split into equal shards.
    """
    return _exchange(x, group, _own_shard, _gather)
