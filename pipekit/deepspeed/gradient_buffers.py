"""Flat buffers in which the gradients of a step accumulate, in place: no copy is made to reduce or to update."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pipekit.tensors.weight_gradients import Compute, add_gradient


@dataclass(frozen=True)
class GradientGroup:
    """Flat gradients of the parameters of one parameter group.

    Attributes:
        flat: `(N,)`, in fp32.
        starts: index in `flat` of the first element of each parameter.
        shard: number of elements that each replica updates, the first replica the first of them; None where each
            updates all.
    """

    flat: Tensor
    starts: Mapping[Tensor, int]
    shard: int | None = None

    @classmethod
    def beside(
        cls, flat_weights: Tensor, flat: Tensor, parameters: Sequence[Tensor], *, replicas: int
    ) -> GradientGroup:
        """Gradients in the order in which an optimizer that shards its states has flattened the weights."""
        first = flat_weights.storage_offset()
        starts = {parameter: int(parameter.storage_offset() - first) for parameter in parameters}
        return cls(flat, starts, shard=flat.numel() // replicas)

    def pieces(self, rank: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Parameters of which a replica updates something, and the gradients of that `(n,)`."""
        shard = self.flat.numel() if self.shard is None else self.shard
        for parameter, start in self.starts.items():
            lower, upper = max(start, rank * shard), min(start + parameter.numel(), (rank + 1) * shard)
            if lower < upper:
                yield parameter, self.flat[lower:upper]


class GradientBuffers:
    """Gradients of a step in flat buffers; the gradient of each backward is added to them as soon as it is there.

    A gradient of the buffers' own precision stays in `parameter.grad`, which is a view of its buffer.

    Args:
        groups: one for each parameter group of the optimizer.
    """

    def __init__(self, groups: Sequence[GradientGroup]) -> None:
        self.groups = groups
        self._views = {
            parameter: group.flat[start : start + parameter.numel()].view_as(parameter)
            for group in groups
            for parameter, start in group.starts.items()
        }
        # A buffer is not cleared: the first gradient of a step is copied into it.
        self._filled: set[Tensor] = set()
        self.on_added: Callable[[Tensor], None] | None = None
        """Called with a parameter whenever something has been added to its gradient."""
        weak = weakref.ref(self)

        def take(parameter: Tensor) -> None:
            buffers = weak()
            if buffers is not None:
                buffers._take(parameter)

        for parameter in self._views:
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(take)  # type: ignore[no-untyped-call]

    def __contains__(self, parameter: Tensor) -> bool:
        return parameter in self._views

    def _take(self, parameter: Tensor) -> None:
        gradient = parameter.grad
        # Where a weight gradient is deferred, there is none.
        if gradient is not None and gradient is not self._views[parameter]:
            self._add(parameter, gradient)
        if self.on_added is not None:
            self.on_added(parameter)

    def _add(self, parameter: Tensor, gradient: Tensor) -> None:
        buffer = self._views[parameter]
        if parameter in self._filled:
            buffer.add_(gradient)
        else:
            buffer.copy_(gradient)
            self._fill(parameter)
        if parameter.dtype != buffer.dtype:
            parameter.grad = None

    def _fill(self, parameter: Tensor) -> None:
        buffer = self._views[parameter]
        self._filled.add(parameter)
        if parameter.dtype == buffer.dtype:
            parameter.grad = buffer

    def add(self, parameter: Tensor, compute: Compute) -> None:
        """Add what `compute` returns to the gradient of a parameter."""
        if parameter.grad is None:
            self._add(parameter, compute())
        else:
            add_gradient(parameter, compute)
        if self.on_added is not None:
            self.on_added(parameter)

    def gradient(self, parameter: Tensor) -> Tensor | None:
        """Return the accumulated gradient of a parameter; None where this step has none so far."""
        return self._views[parameter] if parameter in self._filled else None

    def gradient_or_zeros(self, parameter: Tensor) -> Tensor:
        """Return the accumulated gradient of a parameter, which is zero from now on if there was none."""
        if parameter not in self._filled:
            self._views[parameter].zero_()
            self._fill(parameter)
        return self._views[parameter]

    def fill(self) -> None:
        """Let the gradients of all parameters that have none be zero."""
        for parameter in self._views:
            self.gradient_or_zeros(parameter)

    def clear(self) -> None:
        """Forget the gradients."""
        for parameter in self._filled:
            parameter.grad = None
        self._filled.clear()


def flat_gradients(parameters: Sequence[Tensor]) -> list[GradientGroup]:
    """Allocate buffers for parameters that are not flattened, one for each precision among them."""
    groups = []
    for dtype in dict.fromkeys(parameter.dtype for parameter in parameters):
        same = [parameter for parameter in parameters if parameter.dtype == dtype]
        starts, total = dict[Tensor, int](), 0
        for parameter in same:
            starts[parameter] = total
            total += parameter.numel()
        groups.append(GradientGroup(torch.zeros(total, dtype=dtype, device=same[0].device), starts))
    return groups
