"""The most even partition among those that keep every stage within bounds."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pipekit.partitioners.prefix_sums import (
    Bound,
    Bounds,
    Indices,
    PrefixSums,
    earliest_start,
    earliest_starts,
    farthest_end,
    in_few_bits,
)

_LARGEST_TOTAL = 2**31  # its square, and a sum of squares, fit into int64


def most_even_boundaries(
    prefix: Sequence[int],
    num_stages: int,
    *,
    limit: int,
    stage_extras: Sequence[int] | None = None,
    memory_bounds: Sequence[Bounds] | None = None,
) -> list[int]:
    """Return the partition within `limit` with the smallest sum of squared stage costs and no empty stage.

    Among several such partitions it returns the one whose boundaries come latest, compared from the last boundary to
    the first. The limit holds exactly. Squares are compared exactly if the total, in units of the costs' greatest
    common divisor, is at most 2**31, and otherwise to 31 bits of the total.

    Args:
        prefix: sums of the first 0, 1, ... costs.
        num_stages: between 1 and the number of layers.
        limit: largest cost of a stage; at least one partition must satisfy it.
        stage_extras: cost of each stage besides its layers; none by default.
        memory_bounds: further bounds of each stage; none by default.

    Source: the dynamic program of Jackson et al. 2005, "An algorithm for optimal partitioning of data on an
        interval", one row a stage; since the best last boundary never moves back as the end moves on, each
        row is filled from its middle outwards (divide and conquer), all entries of one depth at once.

    Example:
        >>> most_even_boundaries([0, 1, 2, 3, 12], 3, limit=9)
        [0, 2, 3, 4]
        >>> most_even_boundaries([0, 1, 2, 3, 12], 3, limit=11, stage_extras=[9, 0, 0])
        [0, 1, 3, 4]
    """
    num_layers = len(prefix) - 1
    extras = stage_extras or [0] * num_stages
    sums = PrefixSums(prefix)
    bounds = [
        [Bound(sums, limit - extras[stage]), *(memory_bounds[stage] if memory_bounds else ())]
        for stage in range(num_stages)
    ]
    earliest, latest = _boundary_ranges(bounds)
    costs_before, small_extras = map(np.array, in_few_bits(prefix, extras, _LARGEST_TOTAL))
    reached = np.array([0])  # the boundaries that stages up to the current one can have, with the least squares to each
    least = np.array([0])
    best_start = np.zeros((num_stages, num_layers + 1), dtype=np.int64)
    for stage in range(num_stages):
        ends = np.arange(earliest[stage + 1], latest[stage + 1] + 1)
        first = np.searchsorted(reached, earliest_starts(bounds[stage], ends))
        last = np.searchsorted(reached, ends) - 1
        possible = first <= last
        ends, first, last = ends[possible], first[possible], last[possible]
        assert len(ends), "no partition keeps the limit"
        before_ends = costs_before[ends] + small_extras[stage]
        picks = _best_starts(least, costs_before[reached], before_ends, first=first, last=last)
        least = least[picks] + (before_ends - costs_before[reached[picks]]) ** 2
        best_start[stage, ends] = reached[picks]
        reached = ends
    boundaries = [num_layers]
    for stage in reversed(range(num_stages)):
        boundaries.append(int(best_start[stage, boundaries[-1]]))
    return boundaries[::-1]


def _boundary_ranges(stages: Sequence[Bounds]) -> tuple[list[int], list[int]]:
    """Return the earliest and the latest layer at which each boundary can be, within the bounds."""
    num_stages, num_layers = len(stages), stages[0][0].sums.num_layers
    latest = [0]
    for num_left, bounds in zip(reversed(range(num_stages)), stages, strict=True):
        reach = max(farthest_end(bounds, latest[-1]), latest[-1])
        latest.append(min(reach, num_layers - num_left))
    earliest = [num_layers]
    for num_before, bounds in zip(reversed(range(num_stages)), reversed(stages), strict=True):
        reach = min(earliest_start(bounds, earliest[-1]), earliest[-1])
        earliest.append(max(reach, num_before))
    earliest.reverse()
    assert earliest[0] == 0, "no partition keeps the limit"
    assert latest[-1] == num_layers, "no partition keeps the limit"
    return earliest, latest


def _best_starts(
    least: Indices, before_starts: Indices, before_ends: Indices, *, first: Indices, last: Indices
) -> Indices:
    """Return, for each end, the latest of the best starts in `[first, last]` of the stage before it.

    Starts are numbered as `least`, the squares of the stages before them, and `before_starts`, their costs, are.
    """
    num_ends = len(before_ends)
    # One entry more at either side, where the search is not narrowed yet.
    found = np.concatenate(([first[0]], np.zeros_like(before_ends), [last[-1]]))
    step = 1 << num_ends.bit_length()
    while step := step // 2:
        # Entries half-way between those found: their best starts lie between those of their neighbours.
        entries = np.arange(step, num_ends + 1, 2 * step)
        low = np.maximum(first[entries - 1], found[entries - step])
        high = np.minimum(last[entries - 1], found[np.minimum(entries + step, num_ends + 1)])
        lengths = high - low + 1
        stops = np.cumsum(lengths)
        starts = np.arange(stops[-1]) + np.repeat(high + 1 - stops, lengths)
        sums = least[starts] + (np.repeat(before_ends[entries - 1], lengths) - before_starts[starts]) ** 2
        smallest = np.repeat(np.minimum.reduceat(sums, stops - lengths), lengths)
        hits = np.flatnonzero(sums == smallest)
        found[entries] = starts[hits[np.searchsorted(hits, stops) - 1]]
    return found[1:-1]
