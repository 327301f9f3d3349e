"""Moving boundaries to advantage."""

from __future__ import annotations

from itertools import accumulate

from hypothesis import given
from hypothesis import strategies as st

from pipekit.partitioners.local_search import StageSums, improve_boundaries

PLACEMENTS = [(0, 1, 2), (0, 1, 1, 0), (0, 1, 0, 1, 0, 1), (0, 0, 1)]


@given(st.lists(st.integers(0, 9), min_size=6, max_size=12), st.sampled_from(PLACEMENTS), st.booleans(), st.data())
def test_it_never_makes_worse_and_stops_where_no_boundary_helps(
    layers: list[int], placement: tuple[int, ...], together: bool, data: st.DataObject
) -> None:
    num_stages = len(placement)
    inner = data.draw(st.sets(st.integers(1, len(layers) - 1), min_size=num_stages - 1, max_size=num_stages - 1))
    start = [0, *sorted(inner), len(layers)]
    costs = StageSums([list(accumulate(layers, initial=0))] * num_stages, [0] * num_stages)

    def badness(boundaries: list[int]) -> tuple[int, int]:
        ranks = costs.ranks(boundaries, placement)
        return max(ranks), sum(load**2 for load in ranks)

    found = improve_boundaries(start, placement, costs, together=together)
    assert sorted(set(found)) == found
    assert badness(found) <= badness(start)
    for stage in range(1, num_stages):
        for cut in range(found[stage - 1] + 1, found[stage + 1]):
            assert badness(found) <= badness([*found[:stage], cut, *found[stage + 1 :]])


def test_memory_comes_before_cost() -> None:
    costs = StageSums([[0, 1, 2, 3, 4]] * 2, [0, 0])
    held = StageSums([[0, 5, 10, 15, 20]] * 2, [4, 0])
    assert improve_boundaries([0, 3, 4], (0, 1), costs, memory=(held, 100)) == [0, 2, 4]
    assert improve_boundaries([0, 3, 4], (0, 1), costs, memory=(held, 16)) == [0, 2, 4]
    assert improve_boundaries([0, 3, 4], (0, 1), costs, memory=(StageSums(held.before, [9, 0]), 15)) == [0, 1, 4]


def test_a_layer_is_handed_on_over_the_stages_between() -> None:
    costs = StageSums([range(10)] * 3, [0] * 3)
    assert improve_boundaries([0, 2, 5, 9], (0, 1, 2), costs) == [0, 2, 5, 9]
    assert improve_boundaries([0, 2, 5, 9], (0, 1, 2), costs, together=True) == [0, 3, 6, 9]
