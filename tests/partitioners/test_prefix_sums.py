"""Filling stages within bounds, against every possible partition."""

from __future__ import annotations

from itertools import combinations, pairwise

from hypothesis import given
from hypothesis import strategies as st

from pipekit.partitioners.prefix_sums import Bound, PrefixSums, can_fill

LAYERS = st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=7)


@given(LAYERS, st.data())
def test_stages_can_be_filled_exactly_where_some_partition_keeps_the_bounds(
    layers: list[tuple[int, int]], data: st.DataObject
) -> None:
    num_stages = data.draw(st.integers(1, len(layers)))
    most = data.draw(st.lists(st.tuples(*[st.integers(-1, 20)] * 2), min_size=num_stages, max_size=num_stages))
    sums = [PrefixSums.of(values) for values in zip(*layers, strict=True)]
    stages = [[Bound(held, limit) for held, limit in zip(sums, limits, strict=True)] for limits in most]
    allowed = any(
        all(
            sum(layer[kind] for layer in layers[start:end]) <= limits[kind]
            for (start, end), limits in zip(pairwise([0, *cuts, len(layers)]), most, strict=True)
            for kind in (0, 1)
        )
        for cuts in combinations(range(1, len(layers)), num_stages - 1)
    )
    assert can_fill(stages) == allowed


def test_numbers_beyond_64_bits_are_kept() -> None:
    sums = PrefixSums.of([10**25, 1, 10**25 + 1])
    assert can_fill([[Bound(sums, 10**25)], [Bound(sums, 10**25 + 2)]])
    assert not can_fill([[Bound(sums, 10**25)], [Bound(sums, 10**25 + 1)]])
