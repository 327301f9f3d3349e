"""Collectives of the tensor group, with their gradients.

Between layers an activation is either whole, and the same on all tensor ranks, or each rank has its part of the
sequence. The gradient of a whole activation is whole on every rank; the gradient of a part is that part's.

Source: Shoeybi et al. 2019, "Megatron-LM", section 3 (`f` and `g`); Korthikanti et al. 2022, "Reducing Activation
Recomputation in Large Transformer Models", section 4.2.1 (their counterparts along the sequence).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pipekit.errors import LayoutError
from pipekit.tensor_parallel.group import TensorGroup
from pipekit.tensor_parallel.shards import part_of

SEQUENCE_DIM = 1
"""Activations are `(B, S, ...)`."""


class _Copy(torch.autograd.Function):
    """A whole activation enters what is computed in parts: its gradient is the sum of theirs."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: TensorGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.group.all_reduce(grad.clone()), None


class _Sum(torch.autograd.Function):
    """Partial results become a whole activation."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: TensorGroup) -> Tensor:
        return group.all_reduce(x.clone())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return grad, None


class _SumToParts(torch.autograd.Function):
    """Partial results of the whole sequence become this rank's part of their sum."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: TensorGroup) -> Tensor:
        ctx.group = group
        return group.reduce_scatter(x, SEQUENCE_DIM)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.group.all_gather(grad, SEQUENCE_DIM), None


class _GatherForParts(torch.autograd.Function):
    """The sequence is joined for what is computed in parts: its gradient is the sum of theirs."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: TensorGroup) -> Tensor:
        ctx.group = group
        return group.all_gather(x, SEQUENCE_DIM)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.group.reduce_scatter(grad, SEQUENCE_DIM), None


class _GatherSequence(torch.autograd.Function):
    """The sequence is joined for what every rank computes alike."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: TensorGroup) -> Tensor:
        ctx.group = group
        return group.all_gather(x, SEQUENCE_DIM)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _own_part(grad, ctx.group), None


class _SplitSequence(torch.autograd.Function):
    """What every rank has whole becomes its part of the sequence."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: TensorGroup) -> Tensor:
        ctx.group = group
        return _own_part(x, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.group.all_gather(grad, SEQUENCE_DIM), None


def _own_part(x: Tensor, group: TensorGroup) -> Tensor:
    check_divisible(x.shape[SEQUENCE_DIM], group)
    first, last = part_of(x.shape[SEQUENCE_DIM], group.rank, group.size)
    return x.narrow(SEQUENCE_DIM, first, last - first).contiguous()


def check_divisible(sequence_length: int, group: TensorGroup) -> None:
    """Check that a sequence can be cut into equal parts.

    Raises:
        LayoutError: if it cannot.
    """
    if sequence_length % group.size:
        raise LayoutError(
            f"a sequence of {sequence_length} tokens cannot be cut into the {group.size} equal parts of sequence "
            f"parallelism; pad it to {-(-sequence_length // group.size) * group.size}, or set "
            "parallel.sequence_parallel=false"
        )


def copy_to_parts(x: Tensor, group: TensorGroup | None) -> Tensor:
    """Return `x`, for a computation that is shared out; the gradient is summed over the group."""
    return x if group is None else _Copy.apply(x, group)  # type: ignore[no-untyped-call]


def sum_parts(x: Tensor, group: TensorGroup | None) -> Tensor:
    """Return the sum of the partial results `x` over the group, whole on every rank."""
    return x if group is None else _Sum.apply(x, group)  # type: ignore[no-untyped-call]


def sum_parts_to_sequence(x: Tensor, group: TensorGroup | None) -> Tensor:
    """Return this rank's part `(B, S / tp, ...)` of the sum of the partial results `x` `(B, S, ...)`."""
    if group is None:
        return x
    check_divisible(x.shape[SEQUENCE_DIM], group)
    own: Tensor = _SumToParts.apply(x, group)  # type: ignore[no-untyped-call]
    return own


def gather_sequence_for_parts(x: Tensor, group: TensorGroup | None) -> Tensor:
    """Return the whole sequence `(B, S, ...)` of the parts `x` `(B, S / tp, ...)`, for what ranks share out."""
    return x if group is None else _GatherForParts.apply(x, group)  # type: ignore[no-untyped-call]


def gather_sequence(x: Tensor, group: TensorGroup | None) -> Tensor:
    """Return the whole sequence `(B, S, ...)` of the parts `x` `(B, S / tp, ...)`, for what all ranks compute alike."""
    return x if group is None else _GatherSequence.apply(x, group)  # type: ignore[no-untyped-call]


def split_sequence(x: Tensor, group: TensorGroup | None) -> Tensor:
    """Return this rank's part `(B, S / tp, ...)` of what all ranks have whole, `(B, S, ...)`.

    Raises:
        LayoutError: if the sequence cannot be cut into equal parts.
    """
    return x if group is None else _SplitSequence.apply(x, group)  # type: ignore[no-untyped-call]
