"""Ranks of two stages each: one in the first half of the pipeline and one in the second.

Both placements that schedules use, looped and V, let the ranks be served one after the other. Ranks that have been
served hold a first part of the left side and a first part of the right side, so a partition is a path over a grid:
from `(0, 0)`, each step is a rank that takes some layers from the left and some from the right. Looped, the sides are
the layers before and after a middle cut; under V, the right side is the model from its end, and the last step must meet
the left side.

Which points of the grid can be reached under a limit is found step by step, for all points at once: a rank can step to
a point if, among the points to the lower left that its forerunners can reach, the one with most cost behind it has
enough. Nothing is left out, so what is found is exact, stages that must not be empty and all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

Numbers: TypeAlias = NDArray[np.int64]
Mask: TypeAlias = NDArray[np.bool_]
Path: TypeAlias = list[tuple[int, int]]

_BELOW_ALL = -(2**62)

LARGEST_SUM = 2**61
"""Sums up to this can be added to one another, and to `_BELOW_ALL`, within 64 bits."""


@dataclass(frozen=True)
class Sides:
    """The two sides of the layers that ranks take from.

    Attributes:
        middle: where the left side ends and the right one begins; None where the right one is the model from its end.
        num_layers: of the model.
    """

    middle: int | None
    num_layers: int

    def sums(self, left_before: Numbers, right_before: Numbers) -> Numbers:
        """Return, for each point of the grid, the sum of what is behind it.

        Args:
            left_before: sums of the first 0, 1, ... layers as they count in the first half of the pipeline.
            right_before: as they count in the second half.
        """
        if self.middle is None:
            left, right = left_before, right_before[-1] - right_before[::-1]
        else:
            left, right = left_before[: self.middle + 1], right_before[self.middle :] - right_before[self.middle]
        behind: Numbers = np.add.outer(left, right)
        return behind

    def ends(self) -> Mask:
        """Return the points at which every layer is taken once."""
        if self.middle is None:
            return np.eye(self.num_layers + 1, dtype=np.bool_)[::-1]
        ends = np.zeros((self.middle + 1, self.num_layers - self.middle + 1), dtype=np.bool_)
        ends[-1, -1] = True
        return ends

    def boundaries(self, path: Path) -> list[int]:
        """Return the boundaries of the stages that a path stands for."""
        left = [i for i, _ in path]
        if self.middle is None:
            return left + [self.num_layers - j for _, j in reversed(path[:-1])]
        return left + [self.middle + j for _, j in path[1:]]


@dataclass(frozen=True)
class Measure:
    """Something of which a rank may hold so much, such as its cost or its bytes.

    Attributes:
        before: for each stage, sums of the first 0, 1, ... layers.
        extras: for each stage, what it holds beside its layers.
    """

    before: Sequence[Numbers]
    extras: Sequence[int]

    def steps(self, sides: Sides) -> list[Numbers]:
        """Return, for each rank in turn, the sums behind every point of the grid as this rank would hold them."""
        made: dict[tuple[int, int], Numbers] = {}
        for left, right in self._stages(sides):
            before = self.before[left], self.before[right]
            key = id(before[0]), id(before[1])
            if key not in made:
                made[key] = sides.sums(*before)
        return [made[id(self.before[left]), id(self.before[right])] for left, right in self._stages(sides)]

    def rooms(self, sides: Sides, limit: int) -> list[int]:
        """Return, for each rank in turn, what its layers may hold under a limit."""
        return [limit - self.extras[left] - self.extras[right] for left, right in self._stages(sides)]

    def largest(self, sides: Sides, boundaries: Sequence[int]) -> int:
        """Cost of the fullest rank."""
        held = [
            int(before[end] - before[start]) + extra
            for before, extra, (start, end) in zip(self.before, self.extras, pairwise(boundaries), strict=True)
        ]
        return max(held[left] + held[right] for left, right in self._stages(sides))

    def _stages(self, sides: Sides) -> Iterator[tuple[int, int]]:
        num_stages = len(self.extras)
        for left in range(num_stages // 2):
            yield left, num_stages - 1 - left if sides.middle is None else num_stages // 2 + left


def smallest_limit_boundaries(
    measure: Measure,
    *,
    nested: bool,
    low: int,
    incumbent: Sequence[int] | None,
    within: tuple[Measure, int] | None = None,
) -> list[int] | None:
    """Return boundaries under which the fullest rank holds as little as it can.

    Args:
        measure: what is held.
        nested: whether placed as a V, rather than looped.
        low: what the fullest rank holds at least.
        incumbent: a partition from which to begin, within the limit below.
        within: something else, and how much of it a rank may hold.

    Returns:
        The boundaries; None if there are none within that limit.
    """
    num_layers = len(measure.before[0]) - 1
    num_ranks = len(measure.extras) // 2
    before = measure.before[0]
    if nested:
        middles: list[int | None] = [None]
    else:
        # The likely ones first: each of the others then takes one look, unless it is better.
        middles = sorted(
            range(num_ranks, num_layers - num_ranks + 1), key=lambda cut: abs(2 * int(before[cut]) - int(before[-1]))
        )
    best = None if incumbent is None else list(incumbent)
    high = None if best is None else measure.largest(Sides(middles[0], num_layers), best)
    for middle in middles:
        if high is not None and high <= low:
            break
        search = _search(Sides(middle, num_layers), measure, within)
        found = search(LARGEST_SUM if high is None else high - 1)
        if found is None:
            continue
        best, high = found
        smallest = low
        while smallest < high:
            limit = (smallest + high) // 2
            found = search(limit)
            if found is None:
                smallest = limit + 1
            else:
                best, high = found
    return best


def _search(
    sides: Sides, measure: Measure, within: tuple[Measure, int] | None
) -> Callable[[int], tuple[list[int], int] | None]:
    """Return a function from a limit to a partition that keeps it, with what its fullest rank holds, or None."""
    sums = [[step] for step in measure.steps(sides)]
    also: list[list[int]] = [[] for _ in sums]
    if within is not None:
        other, other_limit = within
        sums = [[*step, more] for step, more in zip(sums, other.steps(sides), strict=True)]
        also = [[room] for room in other.rooms(sides, other_limit)]
    ends = sides.ends()

    def search(limit: int) -> tuple[list[int], int] | None:
        rooms = [[room, *more] for room, more in zip(measure.rooms(sides, limit), also, strict=True)]
        path = find_path(sums, rooms, ends)
        if path is None:
            return None
        boundaries = sides.boundaries(path)
        return boundaries, measure.largest(sides, boundaries)

    return search


def find_path(sums: Sequence[Sequence[Numbers]], rooms: Sequence[Sequence[int]], ends: Mask) -> Path | None:
    """Return a path from `(0, 0)` to one of `ends` on which every step goes up in both directions, and not too far.

    Args:
        sums: for each step one or two grids, which grow in both directions.
        rooms: how much each of the step's grids may grow over the step.
        ends: where the path may end.

    Returns:
        The points of the path, one more than steps; None if there is none.

    Example:
        >>> grid = np.add.outer(np.array([0, 1, 3]), np.array([0, 4, 5]))
        >>> find_path([[grid], [grid]], [[5], [3]], np.eye(3, dtype=bool))
        [(0, 0), (1, 1), (2, 2)]
    """
    origin = np.zeros(ends.shape, dtype=np.bool_)
    origin[0, 0] = True
    for step_from in (_step_for_each, _step_for_all):
        reached = [origin]
        for grids, growths in zip(sums, rooms, strict=True):
            reached.append(step_from(reached[-1], grids, growths))
        if not (reached[-1] & ends).any():
            return None
        path = _walk_back(reached, sums, rooms, ends)
        if path is not None:
            return path
    return None


def _step_for_each(reached: Mask, grids: Sequence[Numbers], rooms: Sequence[int]) -> Mask:
    """Return the points that are within a step of one that is reached, for each grid by itself: exact with one grid."""
    after = np.zeros_like(reached)
    after[1:, 1:] = True
    for grid, room in zip(grids, rooms, strict=True):
        most = np.where(reached, grid, _BELOW_ALL)
        np.maximum.accumulate(most, axis=0, out=most)
        np.maximum.accumulate(most, axis=1, out=most)
        after[1:, 1:] &= most[:-1, :-1] >= grid[1:, 1:] - room
    return after


def _step_for_all(reached: Mask, grids: Sequence[Numbers], rooms: Sequence[int]) -> Mask:
    """Return the points that are within a step of one that is reached, for all grids at once.

    The sums grow along a row, so of the points of one row the last before a column is the best for that column.
    """
    num_columns = reached.shape[1]
    after = np.zeros_like(reached)
    columns = np.arange(num_columns)
    for row in np.flatnonzero(reached[:-1].any(axis=1)):
        last = np.maximum.accumulate(np.where(reached[row], columns, -1))[:-1]
        first = int(np.argmax(last >= 0))
        if last[first] < 0:
            continue
        near: Any = True
        for grid, room in zip(grids, rooms, strict=True):
            near = near & (grid[row, last[first:]] >= grid[row + 1 :, first + 1 :] - room)
        after[row + 1 :, first + 1 :] |= near
    return after


def _walk_back(
    reached: Sequence[Mask], sums: Sequence[Sequence[Numbers]], rooms: Sequence[Sequence[int]], ends: Mask
) -> Path | None:
    """Return a path through the points that are reached; None where it meets one without a forerunner.

    Of several forerunners it takes the one which leaves the ranks before it most nearly what is theirs.
    """
    last = np.argwhere(reached[-1] & ends)
    i, j = map(int, last[len(last) // 2])
    path = [(i, j)]
    for step in reversed(range(len(sums))):
        near = reached[step][:i, :j].copy()
        for grid, room in zip(sums[step], rooms[step], strict=True):
            near &= grid[:i, :j] >= grid[i, j] - room
        candidates = np.flatnonzero(near)
        if not len(candidates):
            return None
        behind = sums[step][0][:i, :j].ravel()[candidates]
        share = int(sums[step][0][i, j]) * step // (step + 1)
        i, j = map(int, divmod(candidates[np.argmin(np.abs(behind - share))], j))
        path.append((i, j))
    return path[::-1]
