"""Worker processes: what they read is what the loader would have read, and none outlives the rank."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch

from pipekit.data.batch_loader import BatchLoader
from pipekit.data.order import SampleOrder
from pipekit.data.prefetch import Prefetcher
from pipekit.data.workers import Workers
from pipekit.errors import DataError

pytestmark = pytest.mark.distributed

NUM_SAMPLES = 120


class Samples:
    """Samples of several kinds of tensor; some end in a way of their own."""

    def __len__(self) -> int:
        return NUM_SAMPLES

    def __getitem__(self, index: int) -> Any:
        if index == 70:
            raise OSError("sample 70 cannot be read")
        if index == 110:
            os.kill(os.getpid(), signal.SIGKILL)
        if index == 90:
            time.sleep(3600.0)
        labels = torch.tensor([index, os.getpid()])
        return {"mask": torch.tensor(index % 2 == 0), "x": torch.full((2, 3), index, dtype=torch.bfloat16)}, labels


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until_gone(pids: list[int]) -> None:
    until_s = time.monotonic() + 120.0
    while any(map(is_running, pids)):
        assert time.monotonic() < until_s, f"{pids} still run"
        time.sleep(0.05)


def collate(samples: list[Any]) -> Any:
    inputs, labels = zip(*samples, strict=True)
    return {key: torch.stack([each[key] for each in inputs]) for key in inputs[0]}, torch.stack(labels)


def build_loader(micro_batch_size: int = 2, **ranks: int) -> BatchLoader:
    order = SampleOrder(NUM_SAMPLES, 0, shuffle=False)
    sizes = {"global_batch_size": 8, "micro_batch_size": micro_batch_size, **ranks}
    return BatchLoader(Samples(), order, collate=collate, **sizes)


@pytest.fixture(scope="module")
def workers() -> Iterator[Workers]:
    with_three = Workers(build_loader(), 3, timeout_s=120.0)
    yield with_three
    pids = [with_three._process.pid, *children_of(with_three._process.pid)]
    assert len(pids) == 4
    with_three.close()
    wait_until_gone(pids)


def children_of(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def indices(batches: Any) -> list[int]:
    return [int(index) for _, labels in batches for index in labels[:, 0]]


def test_any_step_is_what_the_loader_reads_and_three_processes_read_it(workers: Workers) -> None:
    loader = build_loader()
    pids = set()
    for position in (0, 8, 16, 8, 4, 12, 0, 120):
        for (inputs, labels), (expected, labels_here) in zip(
            workers.iterate_step(position), loader.iterate_step(position), strict=True
        ):
            assert all(torch.equal(inputs[key], expected[key]) for key in expected)
            assert inputs["x"].dtype == torch.bfloat16
            assert torch.equal(labels[:, 0], labels_here[:, 0])
            pids |= set(labels[:, 1].tolist())
    assert len(pids - {os.getpid()}) == 3


def test_a_step_that_was_left_half_read_does_not_disturb_the_next(workers: Workers) -> None:
    half = workers.iterate_step(0)
    assert indices([next(half)]) == [0, 1]
    assert indices(workers.iterate_step(8)) == [*range(8, 16)]
    assert indices(workers.iterate_step(0)) == [*range(8)]


def test_another_order_holds_from_the_next_step_on(workers: Workers) -> None:
    loader = workers._loader
    prefetcher, before = Prefetcher(loader, workers=workers), loader.order
    assert indices(prefetcher.step_batches(0, then=8)) == [*range(8)]
    shuffled = SampleOrder(50, 7)
    prefetcher.set_order(shuffled)
    assert indices(prefetcher.step_batches(8)) == shuffled.indices(8, 8).tolist()
    prefetcher.set_order(before)
    assert indices(prefetcher.step_batches(16)) == [*range(16, 24)]


def test_an_error_of_the_dataset_arises_where_its_step_is_read(workers: Workers) -> None:
    # It is read ahead with the step before.
    assert indices(workers.iterate_step(56)) == [*range(56, 64)]
    read = workers.iterate_step(64)
    assert indices([next(read), next(read), next(read)]) == [*range(64, 70)]
    with pytest.raises(OSError, match="sample 70 cannot be read") as error:
        next(read)
    assert "in __getitem__" in str(error.value.__cause__)


def test_a_worker_that_is_killed_is_told_of_whenever_it_is_asked() -> None:
    with closing(Workers(build_loader(micro_batch_size=1), 2, timeout_s=120.0)) as workers:
        for _ in range(2):
            with pytest.raises(DataError, match=r"data worker 0 of 2 was killed by SIGKILL while it read samples; if"):
                list(workers.iterate_step(104))


def test_a_dataset_that_cannot_be_sent_is_refused() -> None:
    class Local(Samples):
        pass

    order = SampleOrder(NUM_SAMPLES, 0)
    loader = BatchLoader(Local(), order, global_batch_size=2, micro_batch_size=1)
    with pytest.raises(DataError, match=r"data.workers=1: Local cannot be sent to other processes .*local object"):
        Workers(loader, 1, timeout_s=120.0)


RANK = f"""
import sys, time
sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_workers import build_loader, children_of
from pipekit.data.workers import Workers
workers = Workers(build_loader(micro_batch_size=1), 2, timeout_s=3.0)
list(workers.iterate_step(0))
try:
    list(workers.iterate_step(90))
except Exception as error:
    print(error)
print(workers._process.pid, *children_of(workers._process.pid), flush=True)
time.sleep(3600)
"""


def test_a_worker_that_does_not_answer_is_told_of_and_ends_when_the_rank_is_killed() -> None:
    with subprocess.Popen([sys.executable, "-c", RANK], stdout=subprocess.PIPE, text=True) as rank:
        assert rank.stdout is not None
        assert rank.stdout.readline() == (
            "waited 3 s for a data worker to read micro-batch 0 of the step after 90 samples; look at what the dataset "
            "reads from, or raise run.timeout_s\n"
        )
        pids = [int(pid) for pid in rank.stdout.readline().split()]
        assert len(pids) == 3
        assert all(map(is_running, pids))
        rank.kill()
    wait_until_gone(pids)
