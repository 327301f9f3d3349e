"""The double of NCCL over gloo: it does what NCCL does, and finds what NCCL would not forgive."""

from __future__ import annotations

import time

import pytest
import torch
import torch.distributed as dist

from gloo_workers import GlooWorkers, RankError

pytestmark = pytest.mark.distributed


def collectives(rank: int) -> None:
    ones = torch.full((2, 3), float(rank + 1))
    total = ones.clone()
    work = dist.all_reduce(total, async_op=True)
    assert total.isnan().all()
    work.wait()
    assert total.eq(3).all()
    parts = [torch.zeros(2, 3) for _ in range(2)]
    work = dist.all_gather(parts, ones, async_op=True)
    assert all(part.isnan().all() for part in parts)
    work.wait()
    assert [part[0, 0].item() for part in parts] == [1, 2]
    # Halves of one buffer, in place.
    whole = torch.zeros(4, dtype=torch.bfloat16)
    own = whole[2 * rank : 2 * rank + 2].fill_(rank + 5)
    dist.all_gather_into_tensor(whole, own)
    assert whole.tolist() == [5, 5, 6, 6]
    dist.reduce_scatter_tensor(own, whole)
    assert own.tolist() == [10 + 2 * rank] * 2
    number = torch.tensor(7 * (1 - rank))
    work = dist.broadcast(number, src=0, async_op=True)
    assert number.item() == (0x5B if rank else 7)
    work.wait()
    assert number.item() == 7
    found = [None] * 2
    dist.all_gather_object(found, {"rank": rank})
    assert found == [{"rank": 0}, {"rank": 1}]


def test_results_are_those_of_gloo_after_the_wait_and_poison_before_it(gloo: GlooWorkers) -> None:
    gloo.run(2, collectives, nccl=True)


def misuse(rank: int, how: str) -> None:
    buffer = torch.ones(2)
    if how == "size":
        work = dist.isend(buffer, 1) if rank == 0 else dist.irecv(torch.zeros(3), 0)
    elif how == "early":
        # A send waits for its receive, which comes when the buffer has been written to.
        time.sleep(0.2 * rank)
        work = dist.isend(buffer, 1) if rank == 0 else dist.irecv(buffer, 0)
        buffer.zero_()
    else:
        work = dist.all_reduce(buffer, async_op=True)
        if how == "written":
            buffer.zero_()
    if how != "unwaited":
        assert work is not None
        work.wait()


@pytest.mark.parametrize(("how", "message"), [
    ("size", r"rank 0: operation 0 of .* the send of \(2,\) float32 to rank 1, has 8 bytes, and its receive 12"),
    ("early", r"the send of .* was written to before it had left"),
    ("early", r"the receive of \(2,\) float32 from rank 0, had its \(2,\) float32 written to before it had ended"),
    ("written", r"allreduce of \(2,\) float32, had its \(2,\) float32 written to before it had ended"),
    ("unwaited", r"rank 1: .* allreduce of \(2,\) float32, was never waited for"),
])  # fmt: skip
def test_what_nccl_would_not_forgive_is_reported(gloo: GlooWorkers, how: str, message: str) -> None:
    with pytest.raises(RankError, match=message):
        gloo.run(2, misuse, how, nccl=True)
