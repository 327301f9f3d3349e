"""A column- and a row-parallel layer run by several ranks, and the same of torch's layers in one process, for tests."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipekit.tensor_parallel import ColumnParallelLinear, RowParallelLinear, TensorGroup, shard_layer
from tensor_parallel.sharded_model import assert_all_close, join_gradients
from tensor_parallel.threads import run_ranks

B, S, IN, WIDTH, OUT = 2, 12, 5, 14, 6
"""Batch, tokens, inputs, a width that 3 and 4 do not divide, outputs."""


def drawn(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def fill(module: nn.Module, dtype: torch.dtype = torch.float64) -> None:
    """Give a whole module the same weights on every rank, none of them zero."""
    module.to(dtype)
    with torch.no_grad():
        for index, parameter in enumerate(module.parameters()):
            parameter.copy_(drawn(*parameter.shape, seed=100 + index, dtype=dtype))


class Network(nn.Module):
    """Column-parallel, gelu, row-parallel."""

    def __init__(self, *, bias: bool = True, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.column = ColumnParallelLinear(IN, WIDTH, bias)
        self.row = RowParallelLinear(WIDTH, OUT, bias)
        fill(self, dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.row(F.gelu(self.column(x)))  # type: ignore[no-any-return]


class Plain(nn.Module):
    """The same of torch's layers."""

    def __init__(self, *, bias: bool = True, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.column = nn.Linear(IN, WIDTH, bias)
        self.row = nn.Linear(WIDTH, OUT, bias)
        fill(self, dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.row(F.gelu(self.column(x)))  # type: ignore[no-any-return]


class Outcome(NamedTuple):
    """Output of a network, and the gradients of its input and of its weights."""

    output: Tensor
    input_gradient: Tensor | None
    gradients: dict[str, Tensor]


def inputs(*, requires_grad: bool = True, dtype: torch.dtype = torch.float64) -> Tensor:
    return drawn(B, S, IN, seed=1, dtype=dtype).requires_grad_(requires_grad)


def output_gradient(dtype: torch.dtype = torch.float64) -> Tensor:
    return drawn(B, S, OUT, seed=2, dtype=dtype)


def run_plain(module: nn.Module, x: Tensor) -> Outcome:
    y = module(x)
    y.backward(output_gradient(y.dtype))
    return Outcome(y.detach(), x.grad, {name: p.grad for name, p in module.named_parameters() if p.grad is not None})


def own_part(whole: Tensor, group: TensorGroup, sequence_parallel: bool) -> Tensor:
    return whole.chunk(group.size, 1)[group.rank].contiguous() if sequence_parallel else whole


def run_sharded(
    size: int,
    sequence_parallel: bool,
    build: Callable[[], nn.Module],
    x: Tensor,
    call: Callable[[nn.Module, Tensor], Tensor] = lambda module, x: module(x),
) -> Outcome:
    """Return what the ranks get together, checked to be alike where they have it whole."""

    def run(group: TensorGroup) -> tuple[Tensor, Tensor | None, dict[str, nn.Parameter]]:
        module = build()
        shard_layer(module, group, sequence_parallel=sequence_parallel)
        own = own_part(x.detach(), group, sequence_parallel).clone().requires_grad_(x.requires_grad)
        y = call(module, own)
        y.backward(own_part(output_gradient(y.dtype), group, sequence_parallel))  # type: ignore[no-untyped-call]
        return y.detach(), own.grad, dict(module.named_parameters())

    outputs, input_gradients, parameters = zip(*run_ranks(size, run), strict=True)
    trained = [{name: p for name, p in rank.items() if p.requires_grad} for rank in parameters]
    if not x.requires_grad:
        assert all(gradient is None for gradient in input_gradients)
    return Outcome(
        together(outputs, sequence_parallel),
        together(input_gradients, sequence_parallel) if x.requires_grad else None,
        join_gradients(trained),
    )


def together(tensors: Sequence[Tensor], sequence_parallel: bool) -> Tensor:
    if sequence_parallel:
        return torch.cat(list(tensors), 1)
    for tensor in tensors:
        torch.testing.assert_close(tensor, tensors[0])
    return tensors[0]


def assert_same(actual: Outcome, expected: Outcome, *, tolerance: float = 1e-10) -> None:
    close = partial(torch.testing.assert_close, rtol=tolerance, atol=tolerance)
    close(actual.output, expected.output)
    if expected.input_gradient is None:
        assert actual.input_gradient is None
    else:
        close(actual.input_gradient, expected.input_gradient)
    assert_all_close(actual.gradients, expected.gradients, tolerance=tolerance)
