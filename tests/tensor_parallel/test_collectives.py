"""Collectives and their gradients, against autograd in one process."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

import pytest
import torch
from torch import Tensor

from pipekit.errors import LayoutError
from pipekit.tensor_parallel import (
    PlannedGroup,
    TensorGroup,
    copy_to_shards,
    gather_sequence,
    gather_sequence_for_shards,
    reduce_scatter_sequence,
    split_sequence,
    sum_partials,
)
from tensor_parallel.threads import run_ranks

B, S, D = 2, 12, 3


class Case(NamedTuple):
    """A collective and what it says in one process.

    Attributes:
        apply: the collective.
        takes: what its argument is: one activation that all ranks have, a tensor of each rank's own, or each rank's
            part of the sequence.
        gives_alike: whether every rank returns the same activation, of which all compute one loss.
        plainly: given the arguments of all ranks, returns their results.
    """

    apply: Callable[[Tensor, TensorGroup | None], Tensor]
    takes: Literal["whole", "own", "part"]
    gives_alike: bool
    plainly: Callable[[list[Tensor]], list[Tensor]]


def total(tensors: list[Tensor]) -> Tensor:
    return torch.stack(tensors).sum(0)


def parts_of(whole: Tensor, size: int) -> list[Tensor]:
    return list(whole.chunk(size, 1))


CASES = {
    # What each rank does with its copy is its own, so that the results do not count as alike.
    "copy_to_shards": Case(copy_to_shards, "whole", False, lambda xs: list(xs)),
    "sum_partials": Case(sum_partials, "own", True, lambda xs: [total(xs)] * len(xs)),
    "reduce_scatter_sequence": Case(reduce_scatter_sequence, "own", False, lambda xs: parts_of(total(xs), len(xs))),
    "gather_sequence_for_shards": Case(
        gather_sequence_for_shards, "part", False, lambda xs: [torch.cat(xs, 1)] * len(xs)
    ),
    "gather_sequence": Case(gather_sequence, "part", True, lambda xs: [torch.cat(xs, 1)] * len(xs)),
    "split_sequence": Case(
        split_sequence,
        "whole",
        False,
        lambda xs: [parts_of(x, len(xs))[rank] for rank, x in enumerate(xs)],
    ),
}


def arguments(case: Case, size: int) -> list[Tensor]:
    """Return every rank's argument; the same tensor for all where they have it whole."""
    generator = torch.Generator().manual_seed(0)
    count = 1 if case.takes == "whole" else size
    length = S // size if case.takes == "part" else S
    drawn = [torch.randn(B, length, D, dtype=torch.float64, generator=generator) for _ in range(count)]
    return drawn * size if case.takes == "whole" else drawn


def output_gradients(case: Case, outputs: list[Tensor]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    drawn = [torch.randn(output.shape, dtype=torch.float64, generator=generator) for output in outputs]
    return drawn[:1] * len(drawn) if case.gives_alike else drawn


@pytest.mark.parametrize("size", [1, 2, 3, 4])
@pytest.mark.parametrize("name", CASES)
def test_result_and_gradient_are_those_of_one_process(name: str, size: int) -> None:
    case = CASES[name]
    leaves = [x.clone() for x in arguments(case, size)]
    if case.takes == "whole":
        leaves = leaves[:1] * size
    for leaf in leaves:
        leaf.requires_grad_()
    expected = case.plainly(leaves)
    weights = output_gradients(case, expected)
    counted = 1 if case.gives_alike else size
    torch.autograd.backward(expected[:counted], weights[:counted])

    def run(group: TensorGroup) -> tuple[Tensor, Tensor]:
        x = arguments(case, size)[group.rank].clone().requires_grad_()
        before, given = x.detach().clone(), weights[group.rank].clone()
        y = case.apply(x, group)
        y.backward(given)  # type: ignore[no-untyped-call]
        assert x.grad is not None
        assert torch.equal(x.detach(), before), "the argument was changed"
        assert torch.equal(given, weights[group.rank]), "the gradient that came in was changed"
        assert y.is_contiguous()
        assert x.grad.is_contiguous()
        return y.detach(), x.grad

    for rank, (y, gradient) in enumerate(run_ranks(size, run)):
        torch.testing.assert_close(y, expected[rank].detach())
        torch.testing.assert_close(gradient, leaves[rank].grad)


@pytest.mark.parametrize("name", CASES)
def test_without_a_group_nothing_is_done(name: str) -> None:
    x = torch.ones(1, 3, 1)
    assert CASES[name].apply(x, None) is x


@pytest.mark.parametrize("name", CASES)
def test_shapes_alone_are_enough(name: str) -> None:
    case, size = CASES[name], 3
    for rank, (x, real) in enumerate(zip(arguments(case, size), case.plainly(arguments(case, size)), strict=True)):
        planned = x.to("meta").requires_grad_()
        y = case.apply(planned, PlannedGroup(rank, size))
        y.sum().backward()  # type: ignore[no-untyped-call]
        assert y.shape == real.shape
        assert planned.grad is not None
        assert planned.grad.shape == x.shape


@pytest.mark.parametrize("name", CASES)
def test_inputs_without_gradients_get_none(name: str) -> None:
    def run(group: TensorGroup) -> bool:
        return CASES[name].apply(arguments(CASES[name], 2)[group.rank], group).requires_grad

    assert run_ranks(2, run) == [False, False]


@pytest.mark.parametrize("apply", [split_sequence, reduce_scatter_sequence])
def test_a_sequence_that_cannot_be_split_evenly_is_refused(apply: Callable[[Tensor, TensorGroup], Tensor]) -> None:
    with pytest.raises(LayoutError, match=r"10 tokens .*3 equal shards.*pad it to 12.*sequence_parallel=false"):
        apply(torch.ones(1, 10, 2), PlannedGroup(0, 3))


def test_a_gathered_sequence_can_be_split_again() -> None:
    whole = torch.arange(24.0).reshape(2, 12, 1)

    def run(group: TensorGroup) -> tuple[Tensor, Tensor]:
        part = split_sequence(whole, group)
        return part, gather_sequence(part, group)

    parts, wholes = zip(*run_ranks(4, run), strict=True)
    assert torch.equal(torch.cat(parts, 1), whole)
    for joined in wholes:
        assert torch.equal(joined, whole)
