"""Ranks of equal cost, against every possible partition."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from itertools import combinations, pairwise

import numpy as np
import pytest

from pipekit.errors import LayoutError
from pipekit.partitioners import MemoryLimit, balanced_boundaries, minmax_boundaries
from pipekit.schedules import plan_placement

Case = tuple[list[float], tuple[int, ...], list[float] | None]

COSTS: dict[str, Callable[[random.Random], float]] = {
    "small": lambda r: r.randint(0, 9),
    "zeros and large ones": lambda r: r.choice([0, 0, 0, 1, 5, 20]),
    "floats": lambda r: r.random(),
    "operations": lambda r: r.randint(0, 10**15),
}
PLACEMENTS = {
    "one": lambda pp: tuple(range(pp)),
    "v": lambda pp: plan_placement("v", pp=pp, stages_per_rank=2),
    "looped": lambda pp: plan_placement("looped", pp=pp, stages_per_rank=2),
}


def every_partition(num_layers: int, num_stages: int) -> Iterator[list[int]]:
    for cuts in combinations(range(1, num_layers), num_stages - 1):
        yield [0, *cuts, num_layers]


def largest_rank(boundaries: Sequence[int], case: Case) -> Fraction:
    costs, placement, extras = case
    ranks = [Fraction()] * (max(placement) + 1)
    for stage, (start, end) in enumerate(pairwise(boundaries)):
        assert start < end
        ranks[placement[stage]] += sum(map(Fraction, costs[start:end]), Fraction(extras[stage] if extras else 0))
    return max(ranks)


def draw_case(generator: random.Random, placed: str, kind: str) -> Case:
    placement = PLACEMENTS[placed](generator.randint(1, 4 if placed == "one" else 3))
    num_layers = generator.randint(len(placement), 9)
    costs = [COSTS[kind](generator) for _ in range(num_layers)]
    costs[generator.randrange(num_layers)] += 1
    extras = [generator.choice([0, COSTS[kind](generator)]) for _ in placement] if generator.random() < 0.5 else None
    return costs, placement, extras


def draw_memory(generator: random.Random, case: Case) -> MemoryLimit:
    num_layers, num_stages = len(case[0]), len(case[1])
    states = [generator.randint(0, 9) for _ in range(num_layers)]
    activations = [generator.randint(0, 5) for _ in range(num_layers)]
    mean = (sum(states) + 2 * sum(activations)) / (max(case[1]) + 1)
    return MemoryLimit(
        states,
        activations,
        in_flight=[generator.randint(1, 4) for _ in range(num_stages)],
        extra_bytes=[generator.choice([0, 0, generator.randint(0, 20)]) for _ in range(num_stages)],
        limit_bytes=int(mean * generator.uniform(0.8, 2)),
    )


@pytest.mark.parametrize("kind", COSTS)
@pytest.mark.parametrize("placed", PLACEMENTS)
def test_the_largest_rank_is_the_least_of_all_partitions(placed: str, kind: str) -> None:
    generator = random.Random(f"{placed} {kind}")
    for _ in range(50):
        case = draw_case(generator, placed, kind)
        costs, placement, extras = case
        found = balanced_boundaries(costs, placement, stage_extras=extras)
        every = every_partition(len(costs), len(placement))
        assert largest_rank(found, case) == min(largest_rank(other, case) for other in every), case


@pytest.mark.parametrize("kind", COSTS)
@pytest.mark.parametrize("placed", PLACEMENTS)
def test_the_largest_rank_is_the_least_of_those_that_fit(placed: str, kind: str) -> None:
    generator = random.Random(f"memory {placed} {kind}")
    refused = 0
    for _ in range(50):
        case = draw_case(generator, placed, kind)
        costs, placement, extras = case
        memory = draw_memory(generator, case)
        held = {tuple(p): max(memory.rank_bytes(p, placement)) for p in every_partition(len(costs), len(placement))}
        allowed = [boundaries for boundaries, most in held.items() if most <= memory.limit_bytes]
        if allowed:
            found = balanced_boundaries(costs, placement, stage_extras=extras, memory=memory)
            assert tuple(found) in allowed, (case, memory)
            assert largest_rank(found, case) == min(largest_rank(other, case) for other in allowed), (case, memory)
            continue
        refused += 1
        need = min(held.values())
        with pytest.raises(LayoutError, match=f"is {need} bytes, {need - memory.limit_bytes} bytes more than the"):
            balanced_boundaries(costs, placement, stage_extras=extras, memory=memory)
    assert 0 < refused < 50


def test_one_stage_a_rank_is_the_min_max_over_stages() -> None:
    costs = [random.Random(1).random() for _ in range(30)]
    assert balanced_boundaries(costs, range(6)) == minmax_boundaries(costs, 6)


@pytest.mark.parametrize("placed", ["v", "looped"])
def test_equal_layers_make_equal_ranks(placed: str) -> None:
    boundaries = balanced_boundaries([1] * 24, PLACEMENTS[placed](4))
    sizes = [end - start for start, end in pairwise(boundaries)]
    placement = PLACEMENTS[placed](4)
    for rank in range(4):
        assert sum(size for size, owner in zip(sizes, placement, strict=True) if owner == rank) == 6


@pytest.mark.parametrize("placed", ["v", "looped"])
def test_the_ranks_beside_the_largest_are_even_too(placed: str) -> None:
    costs = [1] * 20
    costs[9] = 100
    placement = PLACEMENTS[placed](3)
    boundaries = balanced_boundaries(costs, placement)
    ranks = [0] * 3
    for rank, (start, end) in zip(placement, pairwise(boundaries), strict=True):
        ranks[rank] += sum(costs[start:end])
    small, middle, large = sorted(ranks)
    assert large == 101
    assert middle - small <= 1


@pytest.mark.parametrize("placed", ["v", "looped"])
def test_floats_of_unlike_size_are_as_good_as_a_float_can_tell(placed: str) -> None:
    generator = random.Random(placed)
    for _ in range(20):
        placement = PLACEMENTS[placed](2)
        costs = [generator.choice([0.1, 1e-9, 3e4, 1e16]) * generator.random() for _ in range(8)]
        case = costs, placement, None
        found = largest_rank(balanced_boundaries(costs, placement), case)
        best = min(largest_rank(other, case) for other in every_partition(8, 4))
        assert float(found) == pytest.approx(float(best), rel=1e-15)


def test_costs_may_be_of_numpy() -> None:
    for dtype in (np.int32, np.int64, np.float32, np.float64):
        costs = np.array([2**30] * 8, dtype=dtype)  # the total is beyond 32 bits
        assert balanced_boundaries(costs, (0, 1, 1, 0)) == balanced_boundaries([1] * 8, (0, 1, 1, 0))  # type: ignore[arg-type]
        extras = np.zeros(2, dtype=dtype)
        assert balanced_boundaries(costs, (0, 1), stage_extras=extras) == [0, 4, 8]  # type: ignore[arg-type]


def test_layers_without_cost_are_shared_out() -> None:
    assert balanced_boundaries([0] * 8, (0, 1), stage_extras=[5, 0]) == [0, 4, 8]


def test_the_names_of_ranks_do_not_matter() -> None:
    costs = [random.Random(2).random() for _ in range(12)]
    case = costs, (1, 0, 0, 1), None
    renamed = costs, (0, 1, 1, 0), None
    assert largest_rank(balanced_boundaries(*case[:2]), case) == largest_rank(
        balanced_boundaries(*renamed[:2]), renamed
    )


@pytest.mark.parametrize("placement", [plan_placement("v", pp=2, stages_per_rank=3), (0, 1, 0, 1, 0, 1), (0, 0, 1, 1)])
def test_other_placements_are_no_worse_than_balanced_stages(placement: tuple[int, ...]) -> None:
    generator = random.Random(str(placement))
    for _ in range(30):
        costs = [generator.randint(1, 30) for _ in range(20)]
        case = costs, placement, None
        found = largest_rank(balanced_boundaries(costs, placement), case)
        assert found <= largest_rank(minmax_boundaries(costs, len(placement)), case)
        assert found <= 1.4 * sum(costs) / 2


def test_other_placements_keep_the_memory_limit_or_say_what_was_found() -> None:
    placement = plan_placement("looped", pp=2, stages_per_rank=3)

    def limit(limit_bytes: int) -> MemoryLimit:
        return MemoryLimit([10] * 12, [1] * 12, [6, 5, 4, 3, 2, 1], [0] * 6, limit_bytes)

    found = balanced_boundaries([1] * 12, placement, memory=limit(82))
    assert max(limit(82).rank_bytes(found, placement)) <= 82
    with pytest.raises(LayoutError, match="the smallest found need of the largest rank is"):
        balanced_boundaries([1] * 12, placement, memory=limit(50))


def test_what_does_not_fit_is_told_with_what_to_change() -> None:
    memory = MemoryLimit([2**30] * 4, [0] * 4, [1, 1], [0, 0], 3 * 2**29)
    with pytest.raises(LayoutError) as caught:
        balanced_boundaries([1] * 4, (0, 1), memory=memory)
    assert str(caught.value) == (
        "the layers do not fit into the memory of parallel.pp=2 ranks: the smallest possible need of the largest rank "
        "is 2.147 GB, 0.537 GB more than the 1.611 GB that it has; try a parallel.pp greater than 2, "
        "train.activation_checkpointing=true, or a smaller train.micro_batch_size"
    )


@pytest.mark.parametrize(
    ("arguments", "fault"),
    [
        ({"placement": (0, 2)}, "must hold every rank from 0 to 2"),
        ({"placement": ()}, "parallel.pp=0 must be at least 1"),
        (
            {"placement": (0, 1, 2, 2, 1, 0)},
            r"parallel\.pp=3 x 2 on each rank, 6 stages are more than .* try parallel\.pp=2",
        ),
        ({"placement": (0, 1), "stage_extras": [1]}, "stage_extras has 1 entries, and must have one for each of the 2"),
        ({"placement": (0, 1), "stage_extras": [1, -1]}, "stage 1 has the extra cost -1; costs must be finite"),
        ({"placement": (0, 1, 1, 0), "stage_extras": [1, float("nan"), 0, 0]}, "stage 1 has the extra cost nan"),
        ({"placement": (0, 1), "memory": MemoryLimit([1], [1] * 4, [1] * 2, [0] * 2, 9)}, "state_bytes has 1 entries"),
        ({"placement": (0, 1), "memory": MemoryLimit([1] * 4, [1] * 4, [1], [0] * 2, 9)}, "each of the 2 stages"),
        ({"placement": (0, 1), "memory": MemoryLimit([1] * 4, [-1] * 4, [1] * 2, [0] * 2, 9)}, "holds -1"),
    ],
)
def test_what_does_not_fit_together_is_refused(arguments: dict[str, object], fault: str) -> None:
    with pytest.raises(LayoutError, match=fault):
        balanced_boundaries([1] * 4, **arguments)  # type: ignore[arg-type]
