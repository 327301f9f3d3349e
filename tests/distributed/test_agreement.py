"""Agreement of ranks on their numbers: when they are known, and what becomes of a rank that is gone."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch.distributed as dist

from gloo_workers import GlooWorkers
from pipekit.distributed import agreement
from pipekit.distributed.agreement import Agreement
from pipekit.distributed.mpu import ModelParallelUnit
from pipekit.distributed.processes import join_alone, leave_processes
from pipekit.errors import CommunicationError
from pipekit.layout import Layout

pytestmark = pytest.mark.distributed


def exchange_numbers(rank: int) -> dict[str, Any]:
    unit = ModelParallelUnit(Layout(dp=2), timeout_s=120)
    asked = Agreement(unit)
    told = {"fast": [asked.exchange(number if rank == 1 else number // 2, 1) for number in (0, 5, 0, 0)]}
    told["at once"] = [asked.exchange(7 * rank, 0, at_once=True), asked.exchange(0, 0)]
    # A batch of one rank is slow: the next exchange tells it, and from then on they wait.
    time.sleep(1.1 * rank)
    told["slow"] = [asked.exchange(0, 0), asked.exchange(0, 0)]
    agreement._SLOW_MS = 0
    told["slow"] += [asked.exchange(0, 0), asked.exchange(3 * rank, 0), asked.exchange(0, 4 * rank)]
    asked.finish()
    began_s = time.monotonic()
    for _ in range(200):
        asked._is_slow = False
        asked.exchange(0, 0)
    cost_s = (time.monotonic() - began_s) / 200
    asked.finish()
    # As a rank that fails: the other one is told where it next waits.
    if rank == 1:
        dist.destroy_process_group(asked._group)
    else:
        with pytest.raises(CommunicationError, match="rank 0 failed while waiting for the other ranks to end the same"):
            asked.exchange(0, 0, at_once=True)
    return {**told, "cost_s": cost_s}


def test_all_ranks_know_at_the_next_exchange_or_at_once(gloo: GlooWorkers) -> None:
    first, second = gloo.run(2, exchange_numbers)
    for told in (first, second):
        assert told["fast"] == [[0, 0], [0, 1], [5, 1], [0, 1]]
        assert told["at once"] == [[7, 1], [0, 0]]
        assert told["slow"][-2:] == [[3, 0], [0, 4]]
        assert told["cost_s"] < 0.02


def test_a_single_process_sends_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    join_alone(device="cpu")
    try:
        monkeypatch.setattr(dist, "all_reduce", None)
        alone = Agreement(ModelParallelUnit(Layout()))
        assert [alone.exchange(3, 0), alone.exchange(0, 1, at_once=True)] == [[3, 0], [0, 1]]
        alone.finish()
    finally:
        leave_processes()
