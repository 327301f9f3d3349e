"""Slow ranks among recorded times, and a rank that sleeps in a layer among real ones."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Iterator
from typing import Any

import pytest
from torch import nn

from engine_jobs import Case, build_engine, micro_batches, show
from gloo_workers import GlooWorkers
from pipekit.training.slow_ranks import OwnTime, SlowRankFinder

PEERS = [(0, 1), (2, 3)]
"""Of two stages with two replicas each."""


def times(*computing: float, reading: dict[int, float] | None = None) -> list[OwnTime]:
    step = max(computing) + 0.2
    return [OwnTime(seconds, (reading or {}).get(rank, 0.0), 0.01, step) for rank, seconds in enumerate(computing)]


def named(finder: SlowRankFinder, gatherings: list[list[OwnTime]]) -> list[list[int]]:
    return [[slow.rank for slow in finder.add(each)] for each in gatherings]


def test_a_rank_is_slow_after_six_gatherings_and_no_longer_when_it_recovers() -> None:
    slow, healthy = times(0.4, 0.4, 0.3, 0.6), times(0.4, 0.4, 0.3, 0.3)
    gatherings = [healthy, *[slow] * 7, healthy, *[slow] * 5]
    assert named(SlowRankFinder(PEERS), gatherings) == [[]] * 6 + [[3]] * 2 + [[]] * 6


def test_it_is_told_with_its_peers_and_what_it_spends_the_difference_on() -> None:
    finder = SlowRankFinder(PEERS)
    (slow,) = [finder.add(times(0.4, 0.4, 0.3, 0.3, reading={1: 0.5})) for _ in range(6)][-1]
    assert slow.describe("worker-2") == (
        "rank 1 on host worker-2 is slow: it takes 0.91 s of a step for itself, and its peers take 0.41 s; the "
        "difference goes into reading data. All others wait for it"
    )


def test_a_stage_that_has_more_to_do_is_not_slow() -> None:
    assert named(SlowRankFinder(PEERS), [times(0.9, 0.9, 0.2, 0.2)] * 9) == [[]] * 9


def test_a_rank_is_compared_with_the_median_of_its_peers_itself_left_out() -> None:
    draw = random.Random(6)
    for size in (2, 3, 6, 7):
        gathering = [OwnTime(draw.choice([0.1, 0.2, 0.5, 1.7]), draw.random(), draw.random(), 3.0) for _ in range(size)]
        found = {}
        finder = SlowRankFinder([range(size)])
        for _ in range(6):
            found = {slow.rank: slow for slow in finder.add(gathering)}
        for rank, own in enumerate(gathering):
            others = [vars(each) for each in [*gathering[:rank], *gathering[rank + 1 :]]]
            names = ("computing_s", "reading_s", "between_s")
            usual_s = sum(statistics.median(each[name] for each in others) for name in names)
            assert (rank in found) == (own.own_s > 1.5 * usual_s and own.own_s - usual_s > 0.3)
            assert rank not in found or found[rank].usual_s == pytest.approx(usual_s)


def test_without_peers_a_rank_is_compared_with_itself_and_the_others() -> None:
    finder = SlowRankFinder([(0,), (1,), (2,)])
    assert named(finder, [times(0.9, 0.3, 0.3)] * 9) == [[]] * 9
    # All of them, as where sequences have become longer.
    assert named(finder, [times(2.7, 0.9, 0.9)] * 9) == [[]] * 9
    assert named(finder, [times(2.7, 0.9, 1.9)] * 6)[-1] == [2]
    # The others have become faster, and it has not.
    assert named(finder, [times(0.9, 0.1, 0.1)] * 9) == [[]] * 9


@pytest.mark.parametrize("peers", [PEERS, [(0, 1, 2, 3)], [(0,), (1,), (2,), (3,)]], ids=str)
def test_equal_ranks_under_jitter_raise_no_false_alarm(peers: list[tuple[int, ...]]) -> None:
    draw = random.Random(5)
    finder = SlowRankFinder(peers)
    for _ in range(1500):
        # Each varies by a fifth, and now and then one is held up for as long as a step.
        jittered = [0.3 * draw.lognormvariate(0.0, 0.2) + 0.3 * (draw.random() < 0.03) for _ in range(4)]
        assert finder.add(times(*jittered)) == []


def test_a_small_part_of_the_step_does_not_matter() -> None:
    waiting = [OwnTime(0.01, 0.0, 0.0, 1.0), OwnTime(0.05, 0.0, 0.0, 1.0)]
    assert named(SlowRankFinder([(0, 1)]), [waiting] * 9) == [[]] * 9


def sleep(rank: int, case: Case, culprit: int, where: str, begins: int) -> tuple[list[str], dict[str, float]]:
    from pipekit.training.slow_ranks import StepTimes

    engine = build_engine(case)
    warnings: list[str] = []
    step_times, step = StepTimes(engine, interval=1, warn=warnings.append), 0

    def nap(*args: Any) -> None:
        if rank == culprit and step >= begins:
            time.sleep(0.6)  # much more than a step takes on a busy machine

    layer: nn.Module = engine.module.module_of(engine.module.layer_indices[1])
    if where == "layer":
        layer.register_forward_hook(nap)

    def batches() -> Iterator[Any]:
        if where == "data":
            nap()
        return micro_batches(step, case, engine.mpu.data_parallel_rank)

    metrics: dict[str, float] = {}
    for step in range(1, begins + 13):
        with step_times.timing(step):
            engine.train_batch(step_times.read(batches))
        metrics |= step_times.metrics
    assert engine.executor.stopwatch is None
    return warnings, metrics


@pytest.mark.distributed
@pytest.mark.slow  # measures times, which a busy machine disturbs
@pytest.mark.parametrize(
    ("case", "culprit", "where", "begins", "spent"),
    [
        (Case(tp=2, micro_batch_size=8), 1, "layer", 0, "computing"),
        (Case(dp=2, micro_batch_size=4), 0, "data", 0, "reading data"),
        (Case(dp=2, micro_batch_size=4), 1, "layer", 0, "computing"),
        (Case(pp=2, micro_batch_size=4), 1, "layer", 9, "computing"),
    ],
    ids=lambda value: show(value) if isinstance(value, Case) else str(value),
)
def test_a_rank_that_sleeps_is_named_once_on_every_rank(
    gloo: GlooWorkers, case: Case, culprit: int, where: str, begins: int, spent: str
) -> None:
    for warnings, metrics in gloo.run(case.world_size, sleep, case, culprit, where, begins):
        (warning,) = warnings
        assert warning.startswith(f"rank {culprit} on host ")
        assert f"the difference goes into {spent}" in warning
        assert metrics["slow_rank"] == culprit
        assert metrics["slow_rank_ratio"] > 1.5
