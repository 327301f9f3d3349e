"""Threads and files of destroyed engines, and of processes that have left each other: none remain."""

from __future__ import annotations

import gc
import os
import socket
import time
from typing import Any

import pytest
import torch
import torch.distributed as dist

from engine_jobs import Case, build_engine, micro_batches
from gloo_workers import GlooWorkers
from pipekit.errors import CommunicationError

pytestmark = pytest.mark.distributed

LAYOUTS = [
    Case(pp=4),
    Case(pp=2, dp=2, zero=0),
    Case(tp=2, dp=2),
    Case(pp=2, tp=2, precision="bf16"),
    Case(dp=4, zero=0),
    Case(dp=4, zero=1),
    Case(dp=4, zero=2),
    Case(dp=4, zero=3),
    Case(dp=2, tp=2, zero=2),
    Case(pp=2, dp=2, schedule="zb-h1"),
]


linux = pytest.mark.skipif(not os.path.exists("/proc/self/task"), reason="threads are counted in /proc")


def threads_and_files(at_most: tuple[int, int] | None = None) -> tuple[int, int]:
    """Count the threads and open files of this process; wait a while for those that are about to end."""
    deadline_s = time.monotonic() + 60.0
    while True:
        found = len(os.listdir("/proc/self/task")), len(os.listdir("/proc/self/fd"))
        if at_most is None or (found[0] <= at_most[0] and found[1] <= at_most[1]) or time.monotonic() > deadline_s:
            return found
        time.sleep(0.05)


def assert_no_more(counts: tuple[int, int], first: tuple[int, int], when: str) -> None:
    """Compare threads with threads and files with files."""
    assert counts[0] <= first[0], f"{counts[0]} threads {when}, and {first[0]} before"
    assert counts[1] <= first[1], f"{counts[1]} open files {when}, and {first[1]} before"


def rejoin(rank: int) -> tuple[int, int]:
    """Leave the other processes, join them again, and count what this one has when they have talked."""
    from pipekit.distributed.processes import join_processes, leave_processes

    with socket.create_server(("127.0.0.1", 0)) as server:
        port = [server.getsockname()[1]]
    dist.broadcast_object_list(port, src=0)
    dist.barrier()
    leave_processes()
    os.environ["MASTER_PORT"] = str(port[0])
    join_processes(device="cpu", timeout_s=60.0, local_rank=rank)
    dist.all_reduce(torch.ones(1))
    gc.collect()
    return threads_and_files()


def train(case: Case) -> Any:
    engine = build_engine(case)
    engine.train_batch(micro_batches(0, case, engine.mpu.data_parallel_rank))
    return engine


def destroy_many(rank: int, repeats: int) -> tuple[tuple[int, int], list[tuple[int, int]]]:
    # The first engine loads libraries, which may keep files open.
    train(LAYOUTS[0]).destroy()
    first = rejoin(rank)
    found = []
    for number, case in enumerate(repeats * LAYOUTS, start=1):
        engine = train(case)
        engine.destroy()
        found.append(threads_and_files(first))
        if number % 5 == 0:
            found.append(rejoin(rank))
    return first, found


@linux
@pytest.mark.parametrize("repeats", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_engines_of_ten_layouts_leave_no_thread_and_no_file(gloo: GlooWorkers, repeats: int) -> None:
    for first, found in gloo.run(4, destroy_many, repeats):
        assert len(found) == 12 * repeats
        for number, counts in enumerate(found):
            assert_no_more(counts, first, f"at the count {number}")


def leave_without_destroying(rank: int) -> tuple[tuple[int, int], list[tuple[int, int]]]:
    train(LAYOUTS[0])
    first = rejoin(rank)
    found = []
    for case in LAYOUTS[1:8]:
        train(case)
        found.append(rejoin(rank))
    return first, found


@linux
def test_leaving_ends_the_groups_of_engines_that_nobody_destroyed(gloo: GlooWorkers) -> None:
    for first, found in gloo.run(4, leave_without_destroying):
        for number, counts in enumerate(found):
            assert_no_more(counts, first, f"after {LAYOUTS[number + 1]}")


def share_groups(rank: int) -> dict[str, Any]:
    import deepspeed

    case = Case(dp=2, steps=1)
    first = build_engine(case)
    second = build_engine(case, unit=first.mpu)
    first.destroy()
    first.destroy()
    loss = float(second.train_batch(micro_batches(0, case, rank)))
    second.destroy()
    with pytest.raises(CommunicationError, match=r"freed by engine.destroy\(\); build a new module"):
        build_engine(case, unit=first.mpu)
    # An engine of DeepSpeed without a pipeline takes nothing over from one that had one.
    module = torch.nn.Linear(2, 1)
    plain, *_ = deepspeed.initialize(
        model=module,
        model_parameters=list(module.parameters()),
        config={"train_batch_size": 2, "optimizer": {"type": "SGD", "params": {"lr": 0.1}}},
    )
    plain.backward(plain(torch.ones(1, 2)).sum())
    plain.step()
    return {"loss": loss}


def test_groups_live_until_the_last_engine_that_uses_them_is_destroyed(gloo: GlooWorkers) -> None:
    results = gloo.run(2, share_groups)
    assert results[0] == results[1]
