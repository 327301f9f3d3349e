"""The most even partition under a limit."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import accumulate, combinations, pairwise

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from pipekit.partitioners.even import most_even_boundaries


def every_partition(num_layers: int, num_stages: int) -> Iterator[list[int]]:
    for cuts in combinations(range(1, num_layers), num_stages - 1):
        yield [0, *cuts, num_layers]


def largest(costs: list[int], boundaries: list[int]) -> int:
    return max(sum(costs[start:end]) for start, end in pairwise(boundaries))


def squares(costs: list[int], boundaries: list[int]) -> int:
    return sum(sum(costs[start:end]) ** 2 for start, end in pairwise(boundaries))


@given(st.lists(st.integers(0, 20), min_size=1, max_size=9), st.integers(0, 60), st.data())
def test_it_has_the_least_squares_of_all_that_keep_the_limit(costs: list[int], limit: int, data: st.DataObject) -> None:
    num_stages = data.draw(st.integers(1, len(costs)))
    partitions = every_partition(len(costs), num_stages)
    allowed = [boundaries for boundaries in partitions if largest(costs, boundaries) <= limit]
    assume(allowed)
    best = min(allowed, key=lambda cuts: (squares(costs, cuts), [-end for end in reversed(cuts)]))
    assert most_even_boundaries(list(accumulate(costs, initial=0)), num_stages, limit=limit) == best


@given(st.lists(st.integers(0, 10**25), min_size=2, max_size=8), st.data())
def test_large_costs_are_compared_to_31_bits(costs: list[int], data: st.DataObject) -> None:
    num_stages = data.draw(st.integers(1, len(costs)))
    total = sum(costs)
    boundaries = most_even_boundaries(list(accumulate(costs, initial=0)), num_stages, limit=total)
    best = min(squares(costs, other) for other in every_partition(len(costs), num_stages))
    assert squares(costs, boundaries) - best <= total**2 * num_stages * 4 // 2**31


def test_a_limit_that_none_keeps_is_a_fault_of_the_caller() -> None:
    with pytest.raises(AssertionError, match="no partition keeps the limit"):
        most_even_boundaries([0, 5, 10], 2, limit=4)
