"""Exact partitions for ranks with two stages each: one in the first half of the pipeline and one in the second.

Under both placements that schedules use, looped and V, layers can be assigned rank by rank. The first ranks together
hold the first layers of the left half and the first layers of the right half, so a partition is a path over a grid:
from `(0, 0)`, each step is a rank that takes some layers from the left and some from the right. With a looped
placement, the halves are the layers before and after a middle boundary. Under V, the right half is the model read from
its end, and the last step must meet the left half.

The points of the grid that can be reached under a limit are found step by step, for all points at once: a rank can step
to a point if, among the points to the lower left that the previous ranks can reach, the one with the largest sum is
within the rank's capacity of the point. All partitions are considered, so the result is exact; no stage is empty.
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
class Halves:
    """The two halves of the layers, from which ranks take their layers.

    Attributes:
        middle: end of the left half and start of the right half; None if the right half is the model read from its end.
        num_layers: number of layers of the model.
    """

    middle: int | None
    num_layers: int

    def sums(self, left_before: Numbers, right_before: Numbers) -> Numbers:
        """Sum of the layers taken at each point of the grid, from the prefix sums of each half."""
        if self.middle is None:
            left, right = left_before, right_before[-1] - right_before[::-1]
        else:
            left, right = left_before[: self.middle + 1], right_before[self.middle :] - right_before[self.middle]
        behind: Numbers = np.add.outer(left, right)
        return behind

    def ends(self) -> Mask:
        """Points at which every layer has been taken once."""
        if self.middle is None:
            return np.eye(self.num_layers + 1, dtype=np.bool_)[::-1]
        ends = np.zeros((self.middle + 1, self.num_layers - self.middle + 1), dtype=np.bool_)
        ends[-1, -1] = True
        return ends

    def boundaries(self, path: Path) -> list[int]:
        """Boundaries of the stages along a path."""
        left = [i for i, _ in path]
        if self.middle is None:
            return left + [self.num_layers - j for _, j in reversed(path[:-1])]
        return left + [self.middle + j for _, j in path[1:]]


@dataclass(frozen=True)
class Resource:
    """A resource with a limit for each rank, such as time or memory.

    Attributes:
        before: for each stage, sums of the first 0, 1, ... layers.
        extras: use of each stage besides its layers.
    """

    before: Sequence[Numbers]
    extras: Sequence[int]

    def steps(self, halves: Halves) -> list[Numbers]:
        """Sums at every point of the grid, for each rank in turn."""
        made: dict[tuple[int, int], Numbers] = {}
        for left, right in self._stages(halves):
            before = self.before[left], self.before[right]
            key = id(before[0]), id(before[1])
            if key not in made:
                made[key] = halves.sums(*before)
        return [made[id(self.before[left]), id(self.before[right])] for left, right in self._stages(halves)]

    def capacities(self, halves: Halves, limit: int) -> list[int]:
        """Capacity for layers under a limit, of each rank in turn."""
        return [limit - self.extras[left] - self.extras[right] for left, right in self._stages(halves)]

    def largest(self, halves: Halves, boundaries: Sequence[int]) -> int:
        """Cost of the fullest rank."""
        held = [
            int(before[end] - before[start]) + extra
            for before, extra, (start, end) in zip(self.before, self.extras, pairwise(boundaries), strict=True)
        ]
        return max(held[left] + held[right] for left, right in self._stages(halves))

    def _stages(self, halves: Halves) -> Iterator[tuple[int, int]]:
        num_stages = len(self.extras)
        for left in range(num_stages // 2):
            yield left, num_stages - 1 - left if halves.middle is None else num_stages // 2 + left


def smallest_limit_boundaries(
    resource: Resource,
    *,
    nested: bool,
    low: int,
    incumbent: Sequence[int] | None,
    within: tuple[Resource, int] | None = None,
) -> list[int] | None:
    """Boundaries that minimize the use of a resource by the fullest rank.

    Args:
        resource: the resource.
        nested: whether stages are placed as a V, rather than looped.
        low: lower bound on the use of the fullest rank.
        incumbent: a partition to start from, which keeps to the limit `within`.
        within: another resource, and its limit for a rank.

    Returns:
        The boundaries; None if no partition keeps to this limit.
    """
    num_layers = len(resource.before[0]) - 1
    num_ranks = len(resource.extras) // 2
    before = resource.before[0]
    if nested:
        middles: list[int | None] = [None]
    else:
        # The likely ones first: each of the others then takes one look, unless it is better.
        middles = sorted(
            range(num_ranks, num_layers - num_ranks + 1), key=lambda cut: abs(2 * int(before[cut]) - int(before[-1]))
        )
    best = None if incumbent is None else list(incumbent)
    high = None if best is None else resource.largest(Halves(middles[0], num_layers), best)
    for middle in middles:
        if high is not None and high <= low:
            break
        search = _search(Halves(middle, num_layers), resource, within)
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
    halves: Halves, resource: Resource, within: tuple[Resource, int] | None
) -> Callable[[int], tuple[list[int], int] | None]:
    """Function from a limit to a partition that keeps it, with the use of its fullest rank, or None."""
    sums = [[step] for step in resource.steps(halves)]
    also: list[list[int]] = [[] for _ in sums]
    if within is not None:
        other, other_limit = within
        sums = [[*step, more] for step, more in zip(sums, other.steps(halves), strict=True)]
        also = [[capacity] for capacity in other.capacities(halves, other_limit)]
    ends = halves.ends()

    def search(limit: int) -> tuple[list[int], int] | None:
        capacities = [
            [capacity, *more] for capacity, more in zip(resource.capacities(halves, limit), also, strict=True)
        ]
        path = find_path(sums, capacities, ends)
        if path is None:
            return None
        boundaries = halves.boundaries(path)
        return boundaries, resource.largest(halves, boundaries)

    return search


def find_path(sums: Sequence[Sequence[Numbers]], capacities: Sequence[Sequence[int]], ends: Mask) -> Path | None:
    """Return a path from `(0, 0)` to one of `ends` on which every step increases both coordinates, within capacities.

    Args:
        sums: for each step one or two grids, which increase in both directions.
        capacities: largest increase of each of the step's grids over the step.
        ends: points where the path may end.

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
        for grids, growths in zip(sums, capacities, strict=True):
            reached.append(step_from(reached[-1], grids, growths))
        if not (reached[-1] & ends).any():
            return None
        path = _walk_back(reached, sums, capacities, ends)
        if path is not None:
            return path
    return None


def _step_for_each(reached: Mask, grids: Sequence[Numbers], capacities: Sequence[int]) -> Mask:
    """Return the points that are within a step of one that is reached, for each grid by itself: exact with one grid."""
    after = np.zeros_like(reached)
    after[1:, 1:] = True
    for grid, capacity in zip(grids, capacities, strict=True):
        most = np.where(reached, grid, _BELOW_ALL)
        np.maximum.accumulate(most, axis=0, out=most)
        np.maximum.accumulate(most, axis=1, out=most)
        after[1:, 1:] &= most[:-1, :-1] >= grid[1:, 1:] - capacity
    return after


def _step_for_all(reached: Mask, grids: Sequence[Numbers], capacities: Sequence[int]) -> Mask:
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
        for grid, capacity in zip(grids, capacities, strict=True):
            near = near & (grid[row, last[first:]] >= grid[row + 1 :, first + 1 :] - capacity)
        after[row + 1 :, first + 1 :] |= near
    return after


def _walk_back(
    reached: Sequence[Mask], sums: Sequence[Sequence[Numbers]], capacities: Sequence[Sequence[int]], ends: Mask
) -> Path | None:
    """Return a path through the points that are reached; None where it meets one without a predecessor.

    Of several predecessors it takes the one that leaves the ranks before it most nearly their share.
    """
    last = np.argwhere(reached[-1] & ends)
    i, j = map(int, last[len(last) // 2])
    path = [(i, j)]
    for step in reversed(range(len(sums))):
        near = reached[step][:i, :j].copy()
        for grid, capacity in zip(sums[step], capacities[step], strict=True):
            near &= grid[:i, :j] >= grid[i, j] - capacity
        candidates = np.flatnonzero(near)
        if not len(candidates):
            return None
        behind = sums[step][0][:i, :j].ravel()[candidates]
        share = int(sums[step][0][i, j]) * step // (step + 1)
        i, j = map(int, divmod(candidates[np.argmin(np.abs(behind - share))], j))
        path.append((i, j))
    return path[::-1]
