"""The exact min-max, against every possible partition."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from itertools import combinations, pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipekit.errors import LayoutError
from pipekit.partitioners import minmax_boundaries, stage_costs


def every_partition(num_layers: int, num_stages: int) -> Iterator[list[int]]:
    for cuts in combinations(range(1, num_layers), num_stages - 1):
        yield [0, *cuts, num_layers]


def exact_costs(costs: Sequence[float], boundaries: Sequence[int]) -> list[Fraction]:
    return [sum(map(Fraction, costs[start:end]), Fraction()) for start, end in pairwise(boundaries)]


def best_partition(costs: Sequence[int], num_stages: int) -> list[int]:
    """The least largest cost, then the least sum of squares, then the latest boundaries from the last to the first."""

    def order(boundaries: list[int]) -> tuple[Fraction, Fraction, list[int]]:
        loads = exact_costs(costs, boundaries)
        return max(loads), sum((load**2 for load in loads), Fraction()), [-end for end in reversed(boundaries)]

    return min(every_partition(len(costs), num_stages), key=order)


KINDS: dict[str, Callable[[random.Random], float]] = {
    "small": lambda r: r.randint(1, 9),
    "many zeros": lambda r: r.choice([0, 0, 0, 1, 5]),
    "beyond 64 bits": lambda r: r.randint(0, 10**30),
    "floats": lambda r: r.random() * 10 ** r.randint(-3, 3),
    "floats of unlike size": lambda r: r.choice([0.1, 0.2, 0.3, 1e16, 5e-324, 0.0]),
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_largest_cost_is_the_least_of_all_partitions(kind: str) -> None:
    generator = random.Random(kind)
    for _ in range(300):
        num_layers = generator.randint(1, 9)
        num_stages = generator.randint(1, num_layers)
        costs = [KINDS[kind](generator) for _ in range(num_layers)]
        boundaries = minmax_boundaries(costs, num_stages)
        least = min(max(exact_costs(costs, other)) for other in every_partition(num_layers, num_stages))
        assert max(exact_costs(costs, boundaries)) == least, (costs, num_stages)


@given(st.lists(st.integers(0, 6), min_size=1, max_size=9).filter(any), st.data())
def test_the_other_stages_are_even_and_ties_go_to_the_latest(costs: list[int], data: st.DataObject) -> None:
    num_stages = data.draw(st.integers(1, len(costs)))
    assert minmax_boundaries(costs, num_stages) == best_partition(costs, num_stages)


@given(st.lists(st.floats(0, 1e300), min_size=1, max_size=40), st.data())
def test_boundaries_are_plain_ints_that_grow(costs: list[float], data: st.DataObject) -> None:
    num_stages = data.draw(st.integers(1, len(costs)))
    boundaries = minmax_boundaries(costs, num_stages)
    assert (boundaries[0], boundaries[-1], len(boundaries)) == (0, len(costs), num_stages + 1)
    assert all(start < end for start, end in pairwise(boundaries))
    assert all(type(boundary) is int for boundary in boundaries)


@pytest.mark.parametrize("large", [0, 1, 4])
def test_one_large_layer_does_not_leave_the_others_uneven(large: int) -> None:
    costs = [1] * 9
    costs.insert(large * 9 // 4, 100)
    loads = sorted(stage_costs(costs, minmax_boundaries(costs, 4)))
    assert loads[-1] == 100
    assert loads[0] >= 2


def test_layers_without_cost_are_shared_out() -> None:
    assert minmax_boundaries([0] * 6, 3) == [0, 2, 4, 6]


def test_costs_may_be_of_numpy() -> None:
    for dtype in (np.int32, np.int64, np.float32, np.float64):
        costs = np.array([2**30] * 7, dtype=dtype)  # the total is beyond 32 bits
        assert minmax_boundaries(costs, 7) == list(range(8))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "costs",
    [
        [random.Random(0).randint(1, 10**9) for _ in range(1000)],
        [random.Random(0).random() for _ in range(1000)],
        [1] * 500 + [1000] + [1] * 499,
        [0] * 1000,
    ],
    ids=["ints", "floats", "one large", "zeros"],
)
def test_a_thousand_layers_take_milliseconds(costs: list[float]) -> None:
    start = time.process_time()
    minmax_boundaries(costs, 64)
    assert time.process_time() - start < 0.25  # 10 to 20 ms; the machine may be busy


def test_fewer_layers_than_stages_is_refused_with_what_to_type() -> None:
    with pytest.raises(LayoutError) as caught:
        minmax_boundaries([1] * 8, 9)
    assert str(caught.value) == (
        "parallel.pp=9 stages are more than the model's 8 layers, and a stage must not be empty; try "
        "parallel.pp=8 "
        "or lower"
    )


@pytest.mark.parametrize("cost", [-1, float("nan"), float("inf")])
def test_a_cost_that_is_none_is_refused(cost: float) -> None:
    with pytest.raises(LayoutError, match=f"layer 1 has cost {cost}; costs must be finite and not negative"):
        minmax_boundaries([1, cost], 1)


@pytest.mark.parametrize("num_stages", [0, -1])
def test_no_stage_at_all_is_refused(num_stages: int) -> None:
    with pytest.raises(LayoutError, match=f"parallel.pp={num_stages} must be at least 1"):
        minmax_boundaries([1, 2], num_stages)
