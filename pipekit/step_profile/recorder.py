"""Recorder of steps: the moment at which each operation of a rank begins, and what goes with it."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import torch
from torch.profiler import record_function

from pipekit.engine.stopwatch import Moment
from pipekit.hangs.activity import Activity
from pipekit.schedules.operations import Operation
from pipekit.step_profile.spans import StepSpan, kind_of

_BEGINNING = "beginning the step"


class StepRecorder:
    """Records the operations of steps. A moment belongs to the operation that began last, so that there is no gap.

    Args:
        activity: where the rank notes what it does.
        device: what it computes on. GPUs are timed by events of their stream.
        traces: whether `torch.profiler` sees each operation under its name.
        memory: whether the memory of the rank is read at every operation.

    Attributes:
        memory: seconds of the rank's clock and bytes, at each operation: what torch has allocated on a GPU, and on CPUs
            the resident memory of the process.
    """

    def __init__(self, activity: Activity, device: torch.device, *, traces: bool = False, memory: bool = False) -> None:
        self._activity, self._device, self._traces, self._reads_memory = activity, device, traces, memory
        self._steps: list[list[tuple[Operation | str, Moment]]] = []
        self._named: record_function | None = None
        self.memory: list[tuple[float, int]] = []
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        self._zero, self._zero_s = Moment.now(device), time.perf_counter()

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Record a step, which runs inside."""
        self._steps.append([])
        self._note(_BEGINNING)
        self._activity.observer = self._note
        try:
            yield
        finally:
            self._activity.observer = None
            self._steps[-1].append(("", Moment.now(self._device)))
            self._end_name()

    def steps(self) -> list[list[StepSpan]]:
        """Spans of each recorded step, in seconds of `time.perf_counter` of this rank; waits for the device."""
        return [
            [
                StepSpan(
                    kind_of(doing),
                    "" if isinstance(doing, str) else str(doing),
                    self._zero_s + start.since(self._zero),
                    self._zero_s + end.since(self._zero),
                )
                for (doing, start), (_, end) in pairwise(marks)
            ]
            for marks in self._steps
        ]

    def _note(self, doing: Operation | str) -> None:
        if self._reads_memory:
            self.memory.append((time.perf_counter(), memory_bytes(self._device)))
        if self._traces:
            self._end_name()
            self._named = record_function(_name(doing))
            self._named.__enter__()  # type: ignore[no-untyped-call]
        # Last, so that what recording takes before a step is no part of it.
        self._steps[-1].append((doing, Moment.now(self._device)))

    def _end_name(self) -> None:
        if self._named is not None:
            self._named.__exit__(None, None, None)
            self._named = None


def _name(doing: Operation | str) -> str:
    if isinstance(doing, str):
        return doing
    return f"{doing} (stage {doing.action.stage}, micro-batch {doing.action.micro_batch})"


def memory_bytes(device: torch.device) -> int:
    """Bytes that torch has allocated on a GPU; on CPUs the resident memory of this process."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
