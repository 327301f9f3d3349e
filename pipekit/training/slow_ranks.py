"""Slow ranks: what each rank spends its own time on, gathered now and then, and which is slower than its peers."""

from __future__ import annotations

import copy
import math
import platform
import statistics
import time
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from pipekit.distributed.processes import gather_objects, wait
from pipekit.engine.stopwatch import Stopwatch
from pipekit.engine.training_engine import TrainingEngine

Result = TypeVar("Result")

# A rank is slow where it takes so many times as long as its peers, and so much of a step longer.
_RATIO = 1.5
_SHARE_OF_STEP = 0.1
# In so many gatherings one after the other: a single one may be noise.
_GATHERINGS = 6


@dataclass(frozen=True)
class OwnTime:
    """Seconds of a step that a rank spends on each activity, without waiting for others.

    Attributes:
        computing_s: in layers and in the loss.
        reading_s: waiting for its data to be read.
        between_s: between this step and the one before: callbacks, metrics, saving.
        step_s: the whole step, with all that the rank waits for.
    """

    computing_s: float
    reading_s: float
    between_s: float
    step_s: float

    @property
    def own_s(self) -> float:
        """The rank's own part of it."""
        return self.computing_s + self.reading_s + self.between_s


@dataclass(frozen=True)
class SlowRank:
    """A rank that is slower than its peers.

    Attributes:
        rank: the global rank.
        own_s: its own time of a step.
        usual_s: that of its peers, or what it was itself before.
        reason: what it spends the difference on, in words.
        has_peers: whether it is compared with others.
    """

    rank: int
    own_s: float
    usual_s: float
    reason: str
    has_peers: bool

    @property
    def ratio(self) -> float:
        """Ratio of its time to the expected one."""
        return self.own_s / self.usual_s

    def describe(self, host: str) -> str:
        """Return it in words."""
        others = "its peers take" if self.has_peers else "it took before"
        return (
            f"rank {self.rank} on host {host} is slow: it takes {self.own_s:.3g} s of a step for itself, and {others} "
            f"{self.usual_s:.3g} s; the difference goes into {self.reason}. All others wait for it"
        )


class SlowRankFinder:
    """Finds ranks that are slower than their peers for several gatherings.

    Peers compute the same amount: the replicas and the tensor-parallel ranks of the same stages. A rank is compared
    with the median of its peers, itself left out. One without peers is compared with itself: with the median of its
    first gatherings, and only as far as the other ranks have not changed alike.

    Args:
        groups: ranks that are peers; each rank is in one group.

    Example:
        >>> finder = SlowRankFinder([(0, 1, 2)])
        >>> times = [OwnTime(0.1, 0.0, 0.0, 0.4), OwnTime(0.1, 0.0, 0.0, 0.4), OwnTime(0.3, 0.0, 0.0, 0.4)]
        >>> [[slow.rank for slow in finder.add(times)] for gathering in range(7)]
        [[], [], [], [], [], [2], [2]]
    """

    def __init__(self, groups: Sequence[Sequence[int]]) -> None:
        self._groups = groups
        self._alone = {group[0] for group in groups if len(group) == 1}
        self._first: list[Sequence[OwnTime]] = []
        self._in_a_row = [0] * sum(map(len, groups))

    def add(self, times: Sequence[OwnTime]) -> list[SlowRank]:
        """Take the times of a gathering, by rank; return the ranks that are slow now and were in those before."""
        usual = self._usual_times(times)
        if len(self._first) < _GATHERINGS:
            self._first.append(times)
        found = []
        for rank, (own, expected) in enumerate(zip(times, usual, strict=True)):
            late_s = 0.0 if expected is None else own.own_s - expected.own_s
            is_slow = (
                expected is not None and own.own_s > _RATIO * expected.own_s and late_s > _SHARE_OF_STEP * own.step_s
            )
            self._in_a_row[rank] = self._in_a_row[rank] + 1 if is_slow else 0
            if expected is not None and self._in_a_row[rank] >= _GATHERINGS:
                reason = _reason(own, expected)
                found.append(SlowRank(rank, own.own_s, expected.own_s, reason, rank not in self._alone))
        return found

    def _usual_times(self, times: Sequence[OwnTime]) -> list[OwnTime | None]:
        """Time that each rank should take; None where nothing is known."""
        usual: list[OwnTime | None] = [None] * len(times)
        for group in self._groups:
            if len(group) > 1:
                medians = map(_medians_of_others, _columns([times[rank] for rank in group]))
                for rank, *values in zip(group, *medians, strict=True):
                    usual[rank] = OwnTime(*values)
        if self._alone and len(self._first) == _GATHERINGS:
            firsts = [OwnTime(*map(statistics.median, _columns(each))) for each in zip(*self._first, strict=True)]
            changes = [now.own_s / max(first.own_s, 1e-9) for now, first in zip(times, firsts, strict=True)]
            others_change = _medians_of_others(changes) if len(times) > 1 else [1.0]
            for rank in self._alone:
                factor = max(1.0, others_change[rank])
                usual[rank] = OwnTime(*(factor * value for value in vars(firsts[rank]).values()))
        return usual


def _columns(times: Sequence[OwnTime]) -> Iterator[tuple[float, ...]]:
    return zip(*(vars(each).values() for each in times), strict=True)


def _medians_of_others(values: Sequence[float]) -> list[float]:
    """For each value, the median of all others; sorts them once, since there may be many ranks."""
    ordered, num_others = sorted(values), len(values) - 1
    places = (num_others - 1) // 2, num_others // 2

    def median_without(left_out: int) -> float:
        low, high = (ordered[place + (place >= left_out)] for place in places)
        return (low + high) / 2

    return [median_without(bisect_left(ordered, value)) for value in values]


def _reason(own: OwnTime, usual: OwnTime) -> str:
    names = {"computing_s": "computing", "reading_s": "reading data", "between_s": "what it does between steps"}
    return names[max(names, key=lambda name: vars(own)[name] - vars(usual)[name])]


class StepTimes:
    """Times one step in `interval`, gathers the times of all ranks, and tells of the slow ones.

    The times of a step are sent when the next one is timed, and read when the one after it is, so that no rank waits
    for them. Under tensor parallelism the time in layers is that without the waits for peers. On GPUs, where the host
    does not wait for them, it is with them, and under ZeRO-2 and 3 with the waits for replicas.

    Args:
        engine: whose steps are timed.
        interval: steps between those that are timed.
        warn: called with a warning, on every rank with the same.

    Attributes:
        metrics: of the last gathering: the slowest of the slow ranks, and how many times as long it takes; empty where
            there is none.
    """

    def __init__(self, engine: TrainingEngine, *, interval: int, warn: Callable[[str], None]) -> None:
        layout, world = engine.mpu.layout, range(engine.mpu.layout.world_size)
        stages: list[list[int]] = [[] for _ in range(layout.pp)]
        for rank in world:
            stages[layout.coordinate(rank).pipe].append(rank)
        self._engine, self._interval, self._warn = engine, interval, warn
        self._finder = SlowRankFinder(stages)
        self._group: dist.ProcessGroup | None = None
        if dist.get_backend() != "gloo":
            group = engine.mpu.build_group([world], "gloo", purpose="headers")
            assert group is not None
            self._group = group.process_group
        self._hosts = gather_objects(platform.node())
        self._is_on_gpu = engine.device.type == "cuda"
        self._reading_s = 0.0
        self._between_s = math.inf
        self._ended_s: float | None = None
        self._timed: tuple[Stopwatch, OwnTime] | None = None
        self._gathering: tuple[dist.Work, list[Tensor]] | None = None
        self._named: set[int] = set()
        self.metrics: dict[str, float] = {}

    @contextmanager
    def timing(self, step: int) -> Iterator[None]:
        """Run a step, counted from 1, inside, and time it if it is its turn. All ranks do this together."""
        self.metrics = {}
        executor, started_s = self._engine.executor, time.perf_counter()
        if self._ended_s is not None:
            # The least: what evaluations and checkpoints take is not the rank's own.
            self._between_s = min(self._between_s, started_s - self._ended_s)
        # Not those at multiples, which `train.check_computation` may have computed twice.
        if (step - 1) % self._interval or self._ended_s is None:
            yield
            self._ended_s = time.perf_counter()
            return
        self._exchange()
        stopwatch = None
        if executor.stopwatch is None:
            stopwatch = executor.stopwatch = Stopwatch(self._engine.device)
        self._reading_s, waited_s = 0.0, self._waited_s()
        try:
            yield
        finally:
            # A profile goes on with its own.
            used, executor.stopwatch = executor.stopwatch, None if stopwatch is not None else executor.stopwatch
        self._ended_s = time.perf_counter()
        if used is not None and not used.is_empty:
            between_s = 0.0 if self._is_on_gpu else self._between_s
            took_s = self._ended_s - started_s
            own = OwnTime(waited_s - self._waited_s(), self._reading_s, between_s, took_s)
            self._timed = copy.copy(used), own
        self._between_s = math.inf

    def read(self, batches: Callable[[], Result]) -> Result:
        """Call a function that reads the rank's data, and count its time as that."""
        started_s = time.perf_counter()
        result = batches()
        self._reading_s += time.perf_counter() - started_s
        return result

    def _waited_s(self) -> float:
        group = self._engine.module.tensor_group
        return 0.0 if group is None else group.waited_s

    def _exchange(self) -> None:
        """Read the times that were sent last, and send those that were taken last."""
        if self._gathering is not None:
            work, everyones = self._gathering
            wait(work, "the step times of all ranks")
            self._gathering = None
            self._look([OwnTime(*times.tolist()) for times in everyones])
        if self._timed is not None:
            stopwatch, own = self._timed
            computing_s = own.computing_s + sum(span.end_s - span.start_s for span in stopwatch.spans())
            mine = torch.tensor([computing_s, own.reading_s, own.between_s, own.step_s], dtype=torch.float64)
            everyones = [torch.empty_like(mine) for _ in self._hosts]
            sent = dist.all_gather(everyones, mine, group=self._group, async_op=True)
            assert sent is not None
            self._timed, self._gathering = None, (sent, everyones)

    def _look(self, times: Sequence[OwnTime]) -> None:
        slow = self._finder.add(times)
        for each in slow:
            if each.rank not in self._named:
                self._warn(each.describe(self._hosts[each.rank]))
        self._named = {each.rank for each in slow}
        if slow:
            slowest = max(slow, key=lambda each: each.ratio)
            self.metrics = {"slow_rank": slowest.rank, "slow_rank_ratio": slowest.ratio}
