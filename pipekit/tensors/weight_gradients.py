"""Deferred weight gradients: a backward that computes only input gradients, and leaves weight gradients for later.

A schedule that splits the backward (`I` then `W`) needs the input gradient at once, since another stage waits for it,
and the weight gradient only before the update. Under `split_linear` every `F.linear` on a parameter, including that of
a plain `nn.Linear`, computes its weight gradient through `defer_weight_gradient`; your own autograd function can do
the same.

Source: Qi et al. 2023, "Zero Bubble Pipeline Parallelism", section 2.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.overrides import TorchFunctionMode

Compute = Callable[[], Tensor]
"""Computes a weight gradient; a method `add_to(gradient)` can add it in place without allocating it."""


def add_gradient(parameter: Tensor, compute: Compute) -> None:
    """Add the result of `compute` to the gradient of a parameter, which may still be None.

    Example:
        >>> weight = torch.nn.Parameter(torch.zeros(2))
        >>> for value in (1.0, 2.0):
        ...     add_gradient(weight, lambda: torch.full((2,), value))
        >>> weight.grad
        tensor([3., 3.])
    """
    if parameter.grad is None:
        parameter.grad = compute()
    elif hasattr(compute, "add_to"):
        compute.add_to(parameter.grad)
    else:
        parameter.grad += compute()


class WeightGradients:
    """The weight gradients that one backward has deferred."""

    def __init__(self) -> None:
        self._deferred: list[tuple[Tensor, Compute]] = []

    def append(self, weight: Tensor, compute: Compute) -> None:
        """Defer the gradient of `weight`."""
        self._deferred.append((weight, compute))

    def __len__(self) -> int:
        return len(self._deferred)

    @property
    def weights(self) -> list[Tensor]:
        """Weights whose gradients are deferred, each as often as it was used."""
        return [weight for weight, _ in self._deferred]

    def compute(self, add: Callable[[Tensor, Compute], None]) -> None:
        """Call `add` with every weight and the function that computes its gradient, and free each function at once."""
        while self._deferred:
            add(*self._deferred.pop())


# Autograd calls a backward on threads of its own where there are GPUs, so neither an argument nor a context variable
# reaches it. One backward runs at a time in a process.
_current: WeightGradients | None = None


@contextmanager
def deferring() -> Iterator[WeightGradients]:
    """Collect the weight gradients of the backward that runs inside, instead of computing them."""
    global _current
    assert _current is None, "one backward runs at a time"
    _current = collected = WeightGradients()
    try:
        yield collected
    finally:
        _current = None


def defer_weight_gradient(weight: Tensor, compute: Compute) -> Tensor | None:
    """Compute or defer the gradient of `weight`; returns None if it is deferred.

    Call it in the backward of an autograd function, and return its result as the weight's gradient. A gradient is
    deferred only under a schedule that splits the backward, and only if `weight` is a parameter without hooks.

    Args:
        weight: the parameter that was passed to the function. Keep it as an attribute (`ctx.weight = weight`): under
            activation checkpointing, `save_for_backward` returns a copy, whose gradient is not deferred.
        compute: computes the gradient, in the shape of `weight`; it should keep alive only the tensors that it needs.

    Example:
        >>> class Scale(torch.autograd.Function):
        ...     @staticmethod
        ...     def forward(ctx, x, weight):
        ...         ctx.save_for_backward(x)
        ...         ctx.weight = weight
        ...         return x * weight
        ...     @staticmethod
        ...     def backward(ctx, grad):
        ...         (x,), weight = ctx.saved_tensors, ctx.weight
        ...         return grad * weight, defer_weight_gradient(weight, lambda: (grad * x).sum().reshape(1))
        >>> x, weight = torch.ones(3, requires_grad=True), torch.nn.Parameter(torch.full((1,), 2.0))
        >>> with deferring() as later:
        ...     Scale.apply(x, weight).sum().backward()
        >>> x.grad.tolist(), weight.grad, len(later)
        ([2.0, 2.0, 2.0], None, 1)
        >>> later.compute(lambda weight, compute: print(compute().item()))
        3.0
    """
    if _current is None or not is_deferred(weight):
        return compute()
    _current.append(weight, compute)
    return None


def is_deferred(weight: Tensor) -> bool:
    """True if the gradient of `weight` is deferred in the running backward."""
    # Activation checkpointing gives back a new tensor in place of a saved parameter.
    return _current is not None and isinstance(weight, nn.Parameter) and not weight._backward_hooks


class OuterProduct:
    """Weight gradient `(O, I)` of a linear layer, from the output's gradient `(..., O)` and the input `(..., I)`.

    `inputs` returns that input; it is called once, when the gradient is computed.
    """

    def __init__(self, grad: Tensor, inputs: Callable[[], Tensor]) -> None:
        self._grad, self._inputs = grad, inputs

    def _factors(self) -> tuple[Tensor, Tensor]:
        inputs = self._inputs()
        return self._grad.reshape(-1, self._grad.shape[-1]).t(), inputs.reshape(-1, inputs.shape[-1])

    def __call__(self) -> Tensor:
        return torch.mm(*self._factors())

    def add_to(self, gradient: Tensor) -> None:
        """Add the product to a gradient `(O, I)` in place."""
        gradient.addmm_(*self._factors())


class SumOverRows:
    """Bias gradient of a linear layer: the sum of output gradients `(..., O)` to `(O)`."""

    def __init__(self, grad: Tensor) -> None:
        self._grad = grad

    def __call__(self) -> Tensor:
        return self._grad.reshape(-1, self._grad.shape[-1]).sum(0)


class _Linear(torch.autograd.Function):
    """`F.linear` that can defer its weight gradient."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(inputs)
        ctx.weight, ctx.bias = weight, bias
        return F.linear(inputs, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (inputs,), weight, bias = ctx.saved_tensors, ctx.weight, ctx.bias
        needs_inputs, needs_weight, needs_bias = ctx.needs_input_grad
        return (
            grad.matmul(weight) if needs_inputs else None,
            defer_weight_gradient(weight, OuterProduct(grad, lambda: inputs)) if needs_weight else None,
            defer_weight_gradient(bias, SumOverRows(grad)) if needs_bias else None,
        )


class _SplitLinear(TorchFunctionMode):
    def __init__(self, uncompiled: Callable[..., Tensor] | None = None) -> None:
        super().__init__()
        self._uncompiled = uncompiled

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        split = self._uncompiled if torch.compiler.is_compiling() else _split
        if func is F.linear and split is not None and torch.is_grad_enabled():
            return split(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _split(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    trained = isinstance(weight, nn.Parameter) and weight.requires_grad
    if not trained or type(input) is not Tensor or autocasts(input):
        return F.linear(input, weight, bias)
    output: Tensor = _Linear.apply(input, weight, bias)  # type: ignore[no-untyped-call]
    return output


def autocasts(x: Tensor) -> bool:
    """True if autocast converts `x` to another type before computing with it."""
    device = x.device.type
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


split_linear = _SplitLinear
"""Context manager: every `F.linear` inside can defer its weight gradient in the backward."""


def split_uncompiled_linear() -> Callable[[], TorchFunctionMode]:
    """`split_linear` for layers that torch compiles: `F.linear` runs between the compiled parts, which cannot defer."""
    return partial(_SplitLinear, torch.compiler.disable(_split))  # type: ignore[no-untyped-call]
