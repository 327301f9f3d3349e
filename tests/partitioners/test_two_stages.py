"""Paths over the grid of two halves, against every possible path."""

from __future__ import annotations

from itertools import accumulate, combinations, pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipekit.partitioners.two_stages import Halves, Resource, find_path, smallest_limit_boundaries

LAYERS = st.lists(st.tuples(*[st.integers(0, 6)] * 4), min_size=6, max_size=10)


def sums(layers: list[tuple[int, ...]], kind: int) -> np.ndarray:
    return np.array(list(accumulate((layer[kind] for layer in layers), initial=0)), dtype=np.int64)


def paths(num_left: int, num_right: int, num_steps: int) -> list[list[tuple[int, int]]]:
    def ups(size: int) -> list[tuple[int, ...]]:
        return [(0, *cuts, size) for cuts in combinations(range(1, size), num_steps - 1)]

    return [list(zip(left, right, strict=True)) for left in ups(num_left) for right in ups(num_right)]


@settings(max_examples=100)
@given(LAYERS, LAYERS, st.integers(1, 4), st.data())
def test_a_path_is_found_exactly_where_there_is_one_under_two_limits_that_pull_apart(
    left: list[tuple[int, ...]], right: list[tuple[int, ...]], num_steps: int, data: st.DataObject
) -> None:
    grids = [np.add.outer(sums(left, kind), sums(right, kind)) for kind in (0, 1)]
    capacities = data.draw(st.lists(st.tuples(*[st.integers(3, 40)] * 2), min_size=num_steps, max_size=num_steps))
    ends = np.zeros(grids[0].shape, dtype=bool)
    ends[-1, -1] = True

    def keeps(path: list[tuple[int, int]]) -> bool:
        return all(
            grid[after] - grid[before] <= capacity
            for (before, after), limits in zip(pairwise(path), capacities, strict=True)
            for grid, capacity in zip(grids, limits, strict=True)
        )

    found = find_path([grids] * num_steps, [list(limits) for limits in capacities], ends)
    if found is None:
        assert not any(keeps(path) for path in paths(len(left), len(right), num_steps))
    else:
        assert found[0] == (0, 0)
        assert found[-1] == (len(left), len(right))
        assert all(a < c and b < d for (a, b), (c, d) in pairwise(found))
        assert keeps(found)


def test_what_each_limit_allows_by_itself_may_not_be_allowed_together() -> None:
    # Two ways to the middle: one is cheap and large, the other dear and small.
    costs = np.add.outer(np.array([0, 1, 9, 10]), np.array([0, 9, 10]))
    held = np.add.outer(np.array([0, 9, 10, 19]), np.array([0, 1, 19]))
    ends = np.zeros(costs.shape, dtype=bool)
    ends[-1, -1] = True
    assert find_path([[costs]] * 2, [[10]] * 2, ends) is not None
    assert find_path([[costs], [costs]], [[9], [9]], ends) is None
    assert find_path([[costs, held]] * 2, [[10, 29], [10, 28]], ends) is not None
    assert find_path([[costs, held]] * 2, [[10, 9], [10, 38]], ends) is None


@pytest.mark.parametrize(("middle", "boundaries"), [(None, [0, 1, 3, 5, 6]), (3, [0, 1, 3, 4, 6])])
def test_a_path_stands_for_boundaries(middle: int | None, boundaries: list[int]) -> None:
    halves = Halves(middle, 6)
    path = [(0, 0), (1, 1), (3, 3)]
    assert halves.ends()[3, 3]
    assert halves.boundaries(path) == boundaries


def test_without_a_partition_within_the_limit_there_is_none() -> None:
    before = [np.arange(7)] * 4
    cost, held = Resource(before, [0] * 4), Resource(before, [0, 0, 0, 5])
    assert smallest_limit_boundaries(cost, nested=True, low=0, incumbent=None, within=(held, 5)) is None
    found = smallest_limit_boundaries(cost, nested=True, low=0, incumbent=None, within=(held, 7))
    assert found is not None
    assert (cost.largest(Halves(None, 6), found), held.largest(Halves(None, 6), found)) == (4, 7)
