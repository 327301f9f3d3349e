"""Groups of the channels: two ranks for each directed edge, or the whole pipeline for each direction."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gloo_workers import GlooWorkers
from pipekit.engine.channel_ends import disjoint
from pipekit.layout import Layout

PLACEMENTS = {
    "one stage a rank": (0, 1, 2, 3),
    "interleaved": (0, 1, 2, 3, 0, 1, 2, 3),
    "a V": (0, 1, 2, 3, 3, 2, 1, 0),
}


def pairs_of(placement: tuple[int, ...]) -> list[tuple[int, int]]:
    return sorted({(min(pair), max(pair)) for pair in pairwise(placement) if pair[0] != pair[1]})


@given(st.lists(st.integers(0, 15), min_size=2, max_size=40))
def test_pairs_are_distributed_without_a_rank_that_is_twice_in_a_list(placement: list[int]) -> None:
    pairs = pairs_of(tuple(placement))
    lists = disjoint(pairs)
    assert sorted(pair for found in lists for pair in found) == pairs
    for found in lists:
        ranks = [rank for pair in found for rank in pair]
        assert len(ranks) == len(set(ranks))


@pytest.mark.parametrize("pp", range(2, 17))
def test_a_pipeline_needs_two_lists_and_a_ring_three_at_most(pp: int) -> None:
    assert len(disjoint(pairs_of(tuple(range(pp))))) <= 2
    assert len(disjoint(pairs_of((*range(pp), *range(pp))))) <= 3


def exchange(rank: int, placement: tuple[int, ...], pairs: bool) -> tuple[int, dict[tuple[int, int], float]]:
    """Send along every edge at once, and return the size of this rank's largest group, and all that it received."""
    from unittest import mock

    import torch

    from pipekit.distributed.mpu import ModelParallelUnit
    from pipekit.engine import channel_ends

    layout = Layout(pp=4, dp=2)
    mpu = ModelParallelUnit(layout, placement=placement)
    with mock.patch.object(channel_ends, "has_pairs", return_value=pairs):
        ends = channel_ends.ChannelEnds(mpu, torch.device("cpu"))
    edges = {edge for pair in pairs_of(placement) for edge in (pair, pair[::-1])}
    works, received = [], {}
    for source, target in sorted(edges):
        if target == mpu.pipe_rank:
            end, _ = ends.of(source)
            received[source, target] = torch.full((1,), -1.0)
            works.append(end.receive(received[source, target]))
    for source, target in sorted(edges):
        if source == mpu.pipe_rank:
            end, _ = ends.to(target)
            works.append(end.send(torch.tensor([100.0 * mpu.data_parallel_rank + 10 * source + target])))
    for work in works:
        work.wait()
    largest = max(group.size for group in ends._groups.values())
    return largest, {edge: float(tensor) for edge, tensor in received.items()}


@pytest.mark.distributed
@pytest.mark.parametrize("pairs", [True, False], ids=["of pairs", "of directions"])
@pytest.mark.parametrize("name", PLACEMENTS)
def test_every_edge_carries_what_is_sent_along_it(gloo: GlooWorkers, name: str, pairs: bool) -> None:
    layout, placement = Layout(pp=4, dp=2), PLACEMENTS[name]
    for rank, (largest, received) in enumerate(gloo.run(8, exchange, placement, pairs)):
        place = layout.coordinate(rank)
        assert largest == (2 if pairs else 4)
        sources = {pair[1 - pair.index(place.pipe)] for pair in pairs_of(placement) if place.pipe in pair}
        assert received == {(source, place.pipe): 100.0 * place.data + 10 * source + place.pipe for source in sources}
