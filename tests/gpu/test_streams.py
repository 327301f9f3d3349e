"""The model of NCCL's channels against a GPU: streams of one device that wait for each other as those of ranks do."""

from __future__ import annotations

import ctypes
import threading
import time
from collections import defaultdict
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any, Literal

import pytest
import torch

from gpu_workers import GpuWorkers, on_gpus
from pipekit.schedules import Schedule, plan_schedule
from pipekit.schedules.nccl import Communicator, edge, find_hang
from pipekit.schedules.operations import Operation, plan_operations
from schedules.tables import post_ahead
from schedules.test_nccl import by_direction

pytestmark = pytest.mark.distributed

_LIMIT_S = 1.0
"""Limit for an end that takes milliseconds, if it comes."""


@dataclass(frozen=True)
class Channels:
    """One way to post messages.

    Attributes:
        order: `ours`, or as many receives of each peer ahead of their use.
        groups: communicators for each directed edge, or one for each direction of the pipeline.
        syncs: whether a rank's host waits for all of its streams after each operation.
    """

    order: Literal["ours"] | int
    groups: Literal["edges", "directions"]
    syncs: bool

    @property
    def communicator(self) -> Communicator:
        return edge if self.groups == "edges" else by_direction

    def operations(self, schedule: Schedule) -> list[list[Operation]]:
        if self.order == "ours":
            return [list(row) for row in plan_operations(schedule)]
        return post_ahead(schedule, self.order)


CHANNELS = [
    Channels(order, groups, syncs)
    for order in ("ours", 2)
    for groups in ("edges", "directions")
    for syncs in (False, True)
]


class Flags:
    """Numbers in pinned memory that streams set, and wait for."""

    def __init__(self) -> None:
        self._driver = ctypes.CDLL("libcuda.so.1")
        self._values = torch.zeros(4096, dtype=torch.int32).pin_memory()
        self._index: dict[Hashable, int] = {}
        self._lock = threading.Lock()

    def set(self, stream: torch.cuda.Stream, name: Hashable) -> None:
        self._call("cuStreamWriteValue32_v2", stream, name)

    def wait(self, stream: torch.cuda.Stream, name: Hashable) -> None:
        self._call("cuStreamWaitValue32_v2", stream, name)

    def release(self) -> None:
        """Let everything that waits go on."""
        self._values.fill_(1)

    def _call(self, function: str, stream: torch.cuda.Stream, name: Hashable) -> None:
        with self._lock:
            index = self._index.setdefault(name, len(self._index))
        address = ctypes.c_uint64(self._values.data_ptr() + 4 * index)
        error = getattr(self._driver, function)(ctypes.c_void_p(stream.cuda_stream), address, ctypes.c_uint32(1), 0)
        assert error == 0, f"{function} returned {error}"


def all_end(ranks: list[list[Operation]], channels: Channels) -> bool:
    """Issue each rank's operations from a thread of its own to streams of its own; return whether they end in time."""
    flags, stopped = Flags(), threading.Event()
    streams: dict[tuple[int, Hashable], torch.cuda.Stream] = defaultdict(torch.cuda.Stream)

    def issue(rank: int) -> None:
        torch.cuda.set_device(0)
        computing = streams[rank, None]
        arrived: dict[object, torch.cuda.Event] = {}
        own = {None: computing}
        for operation in ranks[rank]:
            ends = operation.message_of(rank)
            if stopped.is_set():
                return
            if operation.kind == "receive":
                computing.wait_event(arrived[operation.action])
            elif ends is None:
                with torch.cuda.stream(computing):
                    torch.cuda._sleep(20_000)  # type: ignore[no-untyped-call]
            else:
                group = channels.communicator(*ends)
                stream = own[group] = streams[rank, group]  # type: ignore[index]
                stream.wait_stream(computing)
                mine, theirs = ("sent", "posted") if operation.kind == "send" else ("posted", "sent")
                flags.set(stream, (mine, operation.action))
                flags.wait(stream, (theirs, operation.action))
                arrived[operation.action] = stream.record_event()
            if channels.syncs:
                for stream in own.values():
                    stream.synchronize()

    threads = [threading.Thread(target=issue, args=(rank,), daemon=True) for rank in range(len(ranks))]
    for thread in threads:
        thread.start()
    deadline_s = time.monotonic() + _LIMIT_S
    ended = False
    while not ended and time.monotonic() < deadline_s:
        time.sleep(0.002)
        ended = not any(thread.is_alive() for thread in threads) and all(each.query() for each in [*streams.values()])
    stopped.set()
    flags.release()
    for thread in threads:
        thread.join()
    torch.cuda.synchronize()
    return ended


def job(rank: int, pp: int) -> dict[tuple[str, Channels], bool]:
    # A hang is told by its time, so nothing may start late: kernels are loaded, and streams made.
    torch.cuda._sleep(1000)  # type: ignore[no-untyped-call]
    torch.cuda.synchronize()
    return {
        (name, channels): all_end(channels.operations(plan_schedule(name, pp=pp, num_micro_batches=2 * pp)), channels)
        for name in ("gpipe", "1f1b", "interleaved-1f1b", "zb-h1", "zb-v")
        for channels in CHANNELS
    }


@pytest.mark.parametrize("pp", [on_gpus(1, pp) for pp in (2, 3, 4)])
def test_streams_hang_exactly_where_the_model_finds_a_cycle(pp: int) -> None:
    (ended,) = GpuWorkers().run(1, job, pp)
    expected: dict[Any, bool] = {}
    for name, channels in ended:
        rows = channels.operations(plan_schedule(name, pp=pp, num_micro_batches=2 * pp))
        expected[name, channels] = not find_hang(rows, communicator=channels.communicator, syncs=channels.syncs)
    assert ended == expected
    assert all(value for (_, channels), value in ended.items() if channels.order == "ours")
    assert not all(ended.values())
