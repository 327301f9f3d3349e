"""The search for the fastest candidate, against every candidate measured."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import product

import numpy as np
import pytest

from pipekit.tune.search import Candidate, Measured, Search

# A machine that the plan does not know: what its steps really take, as a factor of what is planned.
Machine = Callable[[dict[str, float | str]], float]


def slow_device(properties: dict[str, float | str]) -> float:
    """Three times as slow as its table says, and slower still with small micro-batches."""
    return 3.0 * (1 + 0.8 / float(properties["micro_batch_size"]))


def few_cores(properties: dict[str, float | str]) -> float:
    """Fewer cores than ranks: a pipeline's waiting costs nothing, and tensor parallelism's messages cost a lot."""
    return 2.0 * 1.25 ** math.log2(float(properties["tp"])) * (0.85 if properties["schedule"] == "zb-h1" else 1.0)


def bad_messages(properties: dict[str, float | str]) -> float:
    """Slow links: replicas and their shards cost more than planned."""
    return 0.5 * float(properties["dp"]) ** 0.5 * (1.3 if properties["zero"] == "1" else 1.0)


def table_of(machine: Machine, *, noise: float, seed: int) -> tuple[list[Candidate], list[float]]:
    """Candidates over four devices, and what a step of each really takes in seconds."""
    random = np.random.default_rng(seed)
    candidates, truth = [], []
    for pp, tp, size, schedule, zero in product((1, 2, 4), (1, 2), (1, 2, 4, 8), ("1f1b", "zb-h1"), ("0", "1")):
        dp, number = 4 // (pp * tp), 16 // size
        if dp < 1 or (pp == 1 and schedule != "1f1b") or (dp == 1 and zero == "1") or number % dp:
            continue
        bubble = (pp - 1) / number * (0.4 if schedule == "zb-h1" else 1.0)
        planned_s = 0.1 * (1 + bubble) * (1 + 0.1 * math.log2(tp)) + 0.005 * number / dp
        properties: dict[str, float | str] = {
            "pp": float(pp),
            "dp": float(dp),
            "tp": float(tp),
            "micro_batch_size": float(size),
            "schedule": schedule,
            "zero": zero,
        }
        candidates.append(Candidate(planned_s, 1e9 * size * (1 + pp), properties))
        truth.append(planned_s * machine(properties) * math.exp(noise * random.standard_normal()))
    return candidates, truth


@pytest.mark.parametrize("machine", [slow_device, few_cores, bad_messages])
def test_a_fifth_of_the_runs_finds_what_all_of_them_find(machine: Machine) -> None:
    regrets, of_plan = [], []
    for seed in range(10):
        candidates, truth = table_of(machine, noise=0.02, seed=seed)
        assert 30 <= len(candidates) <= 60
        search = Search(candidates)
        search.run(lambda index, truth=truth: Measured(truth[index]), most_runs=len(candidates) // 5)  # type: ignore[misc]
        assert search.best is not None
        regrets.append(truth[search.best] / min(truth) - 1)
        planned = min(range(len(truth)), key=lambda i, candidates=candidates: candidates[i].planned_s)  # type: ignore[misc]
        of_plan.append(truth[planned] / min(truth) - 1)
    assert max(regrets) < 0.05
    # The plan alone chooses worse, or there would be nothing to learn.
    assert max(of_plan) > max(regrets)
    assert machine is not bad_messages or max(of_plan) > 0.3


def test_the_planned_times_are_corrected_towards_those_that_are_measured() -> None:
    candidates, truth = table_of(slow_device, noise=0.0, seed=0)
    search = Search(candidates)

    def error() -> float:
        found = np.log(search.corrected_s()) - np.log(truth)
        return float(np.abs(found).mean())

    before = error()
    search.run(lambda index: Measured(truth[index]), most_runs=8)
    assert before > 1.0
    assert error() < 0.1


def test_the_search_ends_when_no_candidate_is_expected_to_be_faster() -> None:
    candidates, _ = table_of(slow_device, noise=0.0, seed=0)
    search = Search(candidates)
    search.run(lambda index: Measured(2 * candidates[index].planned_s), most_runs=len(candidates))
    assert len(search.results) < len(candidates) // 2
    assert search.best == min(range(len(candidates)), key=lambda index: candidates[index].planned_s)
    assert search.choose() is None


def test_what_ran_out_of_memory_rules_out_what_needs_more_and_nothing_else() -> None:
    candidates, truth = table_of(few_cores, noise=0.0, seed=0)
    limit = float(np.median([candidate.memory_bytes for candidate in candidates]))

    def measure(index: int) -> Measured:
        if candidates[index].memory_bytes > limit:
            return Measured(None, "memory", "out of memory")
        return Measured(truth[index])

    search = Search(candidates)
    search.run(measure, most_runs=len(candidates))
    failed = [i for i, result in search.results.items() if result.failure == "memory"]
    # Each failure needs less than the ones before.
    needs = [candidates[i].memory_bytes for i in failed]
    assert needs == sorted(set(needs), reverse=True)
    assert search.best is not None
    fitting = [truth[i] for i, candidate in enumerate(candidates) if candidate.memory_bytes <= limit]
    assert truth[search.best] < 1.05 * min(fitting)
    assert all(candidates[i].memory_bytes > limit for i in search.ruled_out())


def test_what_only_saves_memory_is_measured_where_memory_is_short() -> None:
    def runs(limit: float, *, gigabytes: tuple[float, ...] = (4, 3, 2, 1)) -> list[int]:
        candidates = [
            Candidate(0.1, 1e9 * size, {"zero": 1.0 + stage}, stands_in_for=stage - 1 if stage > 1 else None)
            for stage, size in enumerate(gigabytes)
        ]

        def measure(index: int) -> Measured:
            fits = candidates[index].memory_bytes <= limit
            return Measured(0.1 * (1 + index)) if fits else Measured(None, "memory", "out of memory")

        search = Search(candidates)
        search.run(measure, most_runs=4)
        return list(search.results)

    assert runs(limit=4e9) == [0, 1]
    assert runs(limit=2e9) == [0, 1, 2]
    assert runs(limit=1e9) == [0, 1, 2, 3]
    # What needs as much memory as one that ran out of it is not run, but what stands in for that is.
    assert runs(limit=1e9, gigabytes=(4, 3, 3, 1)) == [0, 1, 3]


def test_a_search_that_learns_from_its_last_runs_goes_on() -> None:
    """The second kind is planned to be too slow to try, and is the faster one, as one of the last two runs shows."""
    planned = {"known": (0.1, 0.15), "new": (0.5, 0.51, 0.52, 0.53)}
    candidates = [
        Candidate(planned_s, 1e9, {"kind": kind, "size": 2.0**number})
        for kind, all_s in planned.items()
        for number, planned_s in enumerate(all_s)
    ]
    truth = [0.1, 0.15, 0.09, 0.08, 0.07, 0.06]
    search = Search(candidates)
    search.run(lambda index: Measured(truth[index]), most_runs=20)
    assert list(search.results) == [0, 1, 2, 5]
    assert search.best == 5
    assert search.choose() is None


def test_the_last_runs_go_to_what_is_expected_to_be_fastest() -> None:
    """Nothing is known of the second kind but that it is planned to be slow: that is learnt before, not at the end."""
    kinds = [("known", 0.100), ("known", 0.101), ("known", 0.102), ("new", 0.11), ("new", 0.12)]
    candidates = [
        Candidate(planned_s, 1e9, {"kind": kind, "size": float(1 + index)})
        for index, (kind, planned_s) in enumerate(kinds)
    ]

    def order(most_runs: int) -> list[int]:
        search = Search(candidates)
        search.run(lambda index: Measured(candidates[index].planned_s), most_runs=most_runs)
        return list(search.results)

    assert order(most_runs=2) == [0, 1]
    assert order(most_runs=4)[1] == 3
    assert order(most_runs=4)[2:] == [1, 2]


def test_a_family_that_crashes_is_left_alone() -> None:
    candidates, truth = table_of(few_cores, noise=0.0, seed=0)

    def measure(index: int) -> Measured:
        crashes = candidates[index].properties["schedule"] == "zb-h1"
        return Measured(None, "other", "crashed") if crashes else Measured(truth[index])

    search = Search(candidates)
    search.run(measure, most_runs=len(candidates))
    sound = [i for i, candidate in enumerate(candidates) if candidate.properties["schedule"] == "1f1b"]
    assert search.best is not None
    assert truth[search.best] < 1.05 * min(truth[i] for i in sound)
    crashed = [i for i in search.results if candidates[i].properties["schedule"] == "zb-h1"]
    assert len(crashed) < len(candidates) - len(sound)


def test_where_all_fail_every_candidate_is_tried_and_there_is_no_best() -> None:
    candidates, _ = table_of(few_cores, noise=0.0, seed=0)
    search = Search(candidates[:6])
    search.run(lambda index: Measured(None, "other", "crashed"), most_runs=100)
    assert len(search.results) == 6
    assert search.best is None


def test_the_correction_is_that_of_an_independent_gaussian_process() -> None:
    """Posterior means from the joint distribution, by conditioning with an explicit inverse."""
    candidates, truth = table_of(bad_messages, noise=0.05, seed=3)
    search = Search(candidates)
    for index in (0, 5, 9, 14):
        search.results[index] = Measured(truth[index])
    known, number = list(search.results), len(candidates)
    covariance = np.empty((number, number))
    for i, j in product(range(number), repeat=2):
        alike = []
        for name, one in candidates[i].properties.items():
            other = candidates[j].properties[name]
            if isinstance(one, str) or isinstance(other, str):
                alike.append(float(one == other))
            else:
                alike.append(math.exp(-((math.log2(one) - math.log2(other)) ** 2) / 8))
        covariance[i, j] = 1.0 + 0.25**2 * sum(alike) + 0.15**2 * math.prod(alike)
    planned = np.log([candidate.planned_s for candidate in candidates])
    ratios = np.log(np.array(truth)) - planned
    inverse = np.linalg.inv(covariance[np.ix_(known, known)] + 0.03**2 * np.eye(len(known)))
    centre = np.median(ratios[known])
    expected = planned + centre + covariance[:, known] @ inverse @ (ratios[known] - centre)
    np.testing.assert_allclose(np.log(search.corrected_s()), expected, rtol=1e-9)


def test_of_candidates_that_the_plan_cannot_tell_apart_the_first_is_measured_first() -> None:
    candidates = [Candidate(0.1, 1e9, {"zero": 1.0 + stage}) for stage in range(4)]
    search = Search(candidates)
    search.run(lambda index: Measured(0.1 if index < 2 else 0.05), most_runs=4)
    assert list(search.results) == [0, 1, 2, 3]
