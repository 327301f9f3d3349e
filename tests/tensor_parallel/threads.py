"""Tensor ranks that are threads of one process, for tests of what ranks compute together.

Autograd runs the backward of CPU tensors in the thread that calls it, so a rank's collectives are its own. What is the
process's own, such as `weight_gradients.deferring()` and torch's default generator, must stand around `run_ranks` and
is shared by its ranks.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

from pipekit.tensor_parallel.group import Done, Pending, TensorGroup

Result = TypeVar("Result")

TIMEOUT_S = 60.0


class _Meeting:
    """Where the ranks bring their tensors."""

    def __init__(self, size: int) -> None:
        self.barrier = threading.Barrier(size, timeout=TIMEOUT_S)
        self.brought: list[tuple[str, Tensor] | None] = [None] * size


class ThreadGroup(TensorGroup):
    """One rank of a group of threads; made by `run_ranks`.

    A collective is over when `start_*` returns. Two ranks that do not call the same one, or that bring tensors of
    different shapes or types, are an AssertionError.
    """

    def __init__(self, rank: int, size: int, meeting: _Meeting) -> None:
        self.rank, self.size = rank, size
        self._meeting = meeting

    def start_all_reduce(self, tensor: Tensor) -> Pending:
        return Done(tensor.copy_(_sum(self._exchange("all_reduce", tensor))))

    def start_all_gather(self, tensor: Tensor, dim: int) -> Pending:
        return Done(torch.cat(self._exchange(f"all_gather along {dim}", tensor), dim))

    def start_reduce_scatter(self, tensor: Tensor, dim: int) -> Pending:
        assert tensor.shape[dim] % self.size == 0, f"{tuple(tensor.shape)} cannot be cut into {self.size} along {dim}"
        total = _sum(self._exchange(f"reduce_scatter along {dim}", tensor))
        return Done(total.chunk(self.size, dim)[self.rank].clone())

    def _exchange(self, what: str, tensor: Tensor) -> list[Tensor]:
        """Return copies of what all ranks have brought."""
        meeting = self._meeting
        meeting.brought[self.rank] = (what, tensor.detach())
        meeting.barrier.wait()
        brought = [offer for offer in meeting.brought if offer is not None]
        said = {(name, offer.shape, offer.dtype) for name, offer in brought}
        copies = [offer.clone() for _, offer in brought]
        # What is brought may be overwritten as soon as all have their copies, and not before.
        meeting.barrier.wait()
        assert len(said) == 1, f"the ranks do not agree on a collective: {said}"
        return copies


def run_ranks(size: int, function: Callable[[TensorGroup], Result]) -> list[Result]:
    """Run `function(group)` on each of `size` ranks at once, and return what each returned, by rank.

    Whether gradients are recorded is as in the caller. The first failure of a rank is raised; its peers, which may wait
    for it, are let go.
    """
    meeting = _Meeting(size)
    results: dict[int, Result] = {}
    failures: list[BaseException] = []
    records = torch.is_grad_enabled()

    def run(rank: int) -> None:
        try:
            with torch.set_grad_enabled(records):
                results[rank] = function(ThreadGroup(rank, size, meeting))
        except BaseException as failure:
            failures.append(failure)
            meeting.barrier.abort()

    threads = [threading.Thread(target=run, args=(rank,), name=f"tensor rank {rank}") for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        # A peer that was let go says nothing of the cause.
        raise next((each for each in failures if not isinstance(each, threading.BrokenBarrierError)), failures[0])
    return [results[rank] for rank in range(size)]


def _sum(tensors: list[Tensor]) -> Tensor:
    return torch.stack(tensors).sum(0)
