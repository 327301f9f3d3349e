"""Measured messages among ranks."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from gloo_workers import GlooWorkers
from pipekit.distributed.collective_speed import measure_collectives


def measure(rank: int) -> None:
    speed = measure_collectives(torch.device("cpu"), host=f"host-{rank}", sizes=(64, 4096))
    assert (speed["backend"], speed["world_size"], speed["is_right"]) == ("gloo", 2, True)
    assert speed["hosts"] == ["host-0", "host-1"]
    for times in speed["times"].values():
        assert [size for size, _ in times] == [64, 4096]
        assert all(seconds > 0 for _, seconds in times)
    assert list(speed["times"]) == ["all-reduce", "send"]


def measure_with_a_flipped_bit(rank: int) -> None:
    whole = dist.all_reduce

    def flipping(tensor: torch.Tensor) -> None:
        whole(tensor)
        if rank == 1 and tensor.numel() > 100:
            tensor[-1] += 1

    dist.all_reduce = flipping  # type: ignore[assignment]
    try:
        assert not measure_collectives(torch.device("cpu"), host="", sizes=(64, 4096))["is_right"]
    finally:
        dist.all_reduce = whole


@pytest.mark.distributed
def test_two_ranks_measure_the_same_and_check_what_they_receive(gloo: GlooWorkers) -> None:
    gloo.run(2, measure)
    gloo.run(2, measure_with_a_flipped_bit)
