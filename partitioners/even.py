"""Among the partitions that keep every stage under a limit, one whose stages are as even as can be."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from math import gcd
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

Indices: TypeAlias = NDArray[np.int64]

_LARGEST_TOTAL = 2**31  # its square, and a sum of squares, fit into int64


def most_even_boundaries(prefix: Sequence[int], num_stages: int, *, limit: int) -> list[int]:
    """Return the partition under `limit` with the least sum of squared stage costs and no empty stage.

    Of several such partitions it is the one whose boundaries come latest, from the last boundary to the
    first. The limit is kept exactly; squares are compared exactly where the total, in units of the costs'
    greatest common divisor, is at most 2**31, and to 31 bits of the total elsewhere.

    Args:
        prefix: sums of the first 0, 1, ... costs.
        num_stages: between 1 and the number of layers.
        limit: largest cost of a stage; there must be a partition that keeps it.

    Source: the dynamic program of Jackson et al. 2005, "An algorithm for optimal partitioning of data on an
        interval", one row a stage; since the best last boundary never moves back as the end moves on, each
        row is filled from its middle outwards (divide and conquer), all entries of one depth at once.

    Example:
        >>> most_even_boundaries([0, 1, 2, 3, 12], 3, limit=9)
        [0, 2, 3, 4]
    """
    num_layers = len(prefix) - 1
    earliest, latest = _boundary_ranges(prefix, num_stages, limit)
    earliest_start = np.array([bisect_left(prefix, end - limit) for end in prefix])
    costs_before = _as_small_numbers(prefix)
    least = np.zeros(num_layers + 1, dtype=np.int64)  # of the stages up to the current one, by their end
    best_start = np.zeros((num_stages, num_layers + 1), dtype=np.int64)
    for stage in range(num_stages):
        ends = np.arange(earliest[stage + 1], latest[stage + 1] + 1)
        starts = _best_starts(
            least,
            costs_before,
            ends,
            first=np.maximum(earliest_start[ends], earliest[stage]),
            last=np.minimum(ends - 1, latest[stage]),
        )
        best_start[stage, ends] = starts
        least[ends] = least[starts] + (costs_before[ends] - costs_before[starts]) ** 2
    boundaries = [num_layers]
    for stage in reversed(range(num_stages)):
        boundaries.append(int(best_start[stage, boundaries[-1]]))
    return boundaries[::-1]


def _boundary_ranges(prefix: Sequence[int], num_stages: int, limit: int) -> tuple[list[int], list[int]]:
    """Return the earliest and the latest layer at which each boundary can be, under the limit."""
    num_layers = len(prefix) - 1
    latest = [0]
    for num_left in reversed(range(num_stages)):
        reach = bisect_right(prefix, prefix[latest[-1]] + limit) - 1
        latest.append(min(reach, num_layers - num_left))
    earliest = [num_layers]
    for num_before in reversed(range(num_stages)):
        reach = bisect_left(prefix, prefix[earliest[-1]] - limit)
        earliest.append(max(reach, num_before))
    earliest.reverse()
    assert earliest[0] == 0, "no partition keeps the limit"
    assert latest[-1] == num_layers, "no partition keeps the limit"
    return earliest, latest


def _as_small_numbers(prefix: Sequence[int]) -> Indices:
    unit = gcd(*prefix) or 1
    total = prefix[-1] // unit
    if total <= _LARGEST_TOTAL:
        return np.array([value // unit for value in prefix], dtype=np.int64)
    return np.array([value * _LARGEST_TOTAL // prefix[-1] for value in prefix], dtype=np.int64)


def _best_starts(least: Indices, costs_before: Indices, ends: Indices, *, first: Indices, last: Indices) -> Indices:
    """Return, for each end, the latest of the best starts in `[first, last]` of the stage before it."""
    num_ends = len(ends)
    # One entry more at either side, where the search is not narrowed yet.
    found = np.concatenate(([first[0]], np.zeros_like(ends), [last[-1]]))
    step = 1 << num_ends.bit_length()
    while step := step // 2:
        # Entries half-way between those found: their best starts lie between those of their neighbours.
        entries = np.arange(step, num_ends + 1, 2 * step)
        low = np.maximum(first[entries - 1], found[entries - step])
        high = np.minimum(last[entries - 1], found[np.minimum(entries + step, num_ends + 1)])
        lengths = high - low + 1
        stops = np.cumsum(lengths)
        starts = np.arange(stops[-1]) + np.repeat(high + 1 - stops, lengths)
        sums = least[starts] + (np.repeat(costs_before[ends[entries - 1]], lengths) - costs_before[starts]) ** 2
        smallest = np.repeat(np.minimum.reduceat(sums, stops - lengths), lengths)
        hits = np.flatnonzero(sums == smallest)
        found[entries] = starts[hits[np.searchsorted(hits, stops) - 1]]
    return found[1:-1]
