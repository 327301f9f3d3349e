"""Prefix sums, and the farthest end of a stage under limits on sums over its layers."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from math import gcd
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

Indices: TypeAlias = NDArray[np.int64]

_LARGEST_IN_64_BITS = 2**62  # so that the sum of two stays below 2**63


@dataclass(frozen=True)
class PrefixSums:
    """Prefix sums: sums of the first 0, 1, ... layers' numbers, which are whole and not negative."""

    before: Sequence[int]

    @classmethod
    def of(cls, values: Iterable[int]) -> PrefixSums:
        """Return the prefix sums of one number per layer."""
        return cls(list(accumulate(values, initial=0)))

    @property
    def num_layers(self) -> int:
        """The number of layers."""
        return len(self.before) - 1

    @cached_property
    def array(self) -> NDArray[Any]:
        """The sums as an array; of Python integers if they do not fit in 64 bits."""
        return np.array(self.before, dtype=np.int64 if self.before[-1] < _LARGEST_IN_64_BITS else object)


def in_few_bits(before: Sequence[int], extras: Sequence[int], largest: int) -> tuple[list[int], list[int]]:
    """Sums and extras scaled to a total of at most `largest`, by their greatest common divisor or by rounding down."""
    unit, total = gcd(*before, *extras) or 1, before[-1] + sum(extras)
    factor, divisor = (1, unit) if total // unit <= largest else (largest, total)
    return [value * factor // divisor for value in before], [value * factor // divisor for value in extras]


@dataclass(frozen=True)
class Bound:
    """Upper bound on the sum over a stage's layers; if it is negative, no stage fits, not even an empty one."""

    sums: PrefixSums
    most: int


Bounds: TypeAlias = Sequence[Bound]
"""All bounds on one stage."""


def farthest_end(bounds: Bounds, start: int) -> int:
    """Farthest end of a stage that begins at `start`; `start` or less if not even one layer fits.

    Example:
        >>> farthest_end([Bound(PrefixSums.of([1, 2, 3, 4]), most=5)], 1)
        3
    """
    return min(bisect_right(bound.sums.before, bound.sums.before[start] + bound.most) - 1 for bound in bounds)


def earliest_start(bounds: Bounds, end: int) -> int:
    """Earliest start of a stage that ends at `end`; `end` or more if not even one layer fits."""
    return max(bisect_left(bound.sums.before, bound.sums.before[end] - bound.most) for bound in bounds)


def farthest_ends(bounds: Bounds, starts: Indices) -> Indices:
    """`farthest_end` of each of `starts`."""
    ends = [
        np.searchsorted(bound.sums.array, bound.sums.array[starts] + _clipped(bound), side="right") - 1
        for bound in bounds
    ]
    least: Indices = np.minimum.reduce(ends)
    return least


def earliest_starts(bounds: Bounds, ends: Indices) -> Indices:
    """`earliest_start` of each of `ends`."""
    starts = [np.searchsorted(bound.sums.array, bound.sums.array[ends] - _clipped(bound)) for bound in bounds]
    most: Indices = np.maximum.reduce(starts)
    return most


def _clipped(bound: Bound) -> int:
    """Equivalent costs of the layers, as 64-bit integers wherever their sums fit."""
    return max(-1, min(bound.most, bound.sums.before[-1]))


def can_fill(stages: Sequence[Bounds]) -> bool:
    """True if stages of at least one layer each, within their bounds, can hold every layer.

    Each stage in turn takes as many layers as it can, as long as every stage can take one. If a stage cannot take the
    next layer, it may help to end the stages before it earlier; then every boundary that can be reached is followed.

    Example:
        >>> sums = PrefixSums.of([4, 1, 5])
        >>> can_fill([[Bound(sums, 4)], [Bound(sums, 6)]]), can_fill([[Bound(sums, 6)], [Bound(sums, 4)]])
        (True, False)
    """
    num_layers = stages[0][0].sums.num_layers
    start, stuck = 0, False
    for num_left, bounds in zip(reversed(range(len(stages))), stages, strict=True):
        end = min(farthest_end(bounds, start), num_layers - num_left)
        stuck = stuck or end <= start
        start = max(start, end)
    if start < num_layers or not stuck:  # even with empty stages it does not hold all, or it does with none
        return start == num_layers
    starts = np.array([0])
    for num_left, bounds in zip(reversed(range(len(stages))), stages, strict=True):
        ends = np.minimum(farthest_ends(bounds, starts), num_layers - num_left)
        opens = ends > starts
        # Each start opens the ends behind it up to its farthest: count how many are open at each place.
        change = np.zeros(num_layers + 2, dtype=np.int64)
        np.add.at(change, starts[opens] + 1, 1)
        np.add.at(change, ends[opens] + 1, -1)
        starts = np.flatnonzero(np.cumsum(change))
        if not len(starts):
            return False
    return bool(starts[-1] == num_layers)
