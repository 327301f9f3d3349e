"""The ranks that are threads talk as processes do."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import Tensor

from pipekit.tensor_parallel import TensorGroup
from tensor_parallel import threads
from tensor_parallel.threads import run_ranks


@pytest.mark.parametrize("size", [1, 2, 3])
def test_every_collective_gives_its_result(size: int) -> None:
    def results(group: TensorGroup) -> dict[str, Tensor]:
        own = torch.arange(float(size)).reshape(1, size) + 10 * group.rank
        return {
            "sum": group.all_reduce(own.clone()),
            "joined": group.all_gather(own, 1),
            "part": group.reduce_scatter(own, 1),
        }

    ranks = run_ranks(size, results)
    whole = torch.stack([torch.arange(float(size)).reshape(1, size) + 10 * rank for rank in range(size)])
    for rank, result in enumerate(ranks):
        assert torch.equal(result["sum"], whole.sum(0))
        assert torch.equal(result["joined"], torch.cat(list(whole), 1))
        assert torch.equal(result["part"], whole.sum(0)[:, rank : rank + 1])


def test_sums_are_in_place_and_the_other_collectives_are_not() -> None:
    def result(group: TensorGroup) -> tuple[float, float]:
        summed, scattered = torch.ones(2), torch.ones(2)
        group.all_reduce(summed)
        group.reduce_scatter(scattered, 0)
        return summed[0].item(), scattered[0].item()

    assert run_ranks(2, result) == [(2.0, 1.0)] * 2


def test_collectives_run_in_the_backward() -> None:
    class Total(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, group):  # type: ignore[no-untyped-def]
            ctx.group = group
            return x * 1

        @staticmethod
        def backward(ctx, grad):  # type: ignore[no-untyped-def]
            return ctx.group.all_reduce(grad.clone()), None

    def gradient(group: TensorGroup) -> float:
        x = torch.ones(1, requires_grad=True)
        (Total.apply(x, group) * (group.rank + 1)).backward()  # type: ignore[no-untyped-call]
        assert x.grad is not None
        return x.grad.item()

    assert run_ranks(3, gradient) == [6.0] * 3


def test_an_error_of_a_rank_is_raised() -> None:
    def fail(group: TensorGroup) -> None:
        if group.rank == 1:
            raise KeyError("on rank 1")
        group.all_reduce(torch.ones(1))

    with pytest.raises(KeyError, match="on rank 1"):
        run_ranks(3, fail)


def test_ranks_that_disagree_are_told() -> None:
    with pytest.raises(AssertionError, match="do not agree"):
        run_ranks(2, lambda group: group.all_reduce(torch.ones(1 + group.rank)))


def test_a_rank_that_does_not_come_is_not_waited_for_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "TIMEOUT_S", 0.2)

    def absent(group: TensorGroup) -> None:
        if group.rank == 0:
            group.all_reduce(torch.ones(1))

    with pytest.raises(threading.BrokenBarrierError):
        run_ranks(2, absent)


def test_gradients_are_recorded_as_in_the_caller() -> None:
    with torch.no_grad():
        assert run_ranks(2, lambda group: torch.is_grad_enabled()) == [False, False]
