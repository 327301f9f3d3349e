"""The one algorithm under every balancing strategy: contiguous stages whose largest cost is as small as it can be."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate, pairwise

from pipekit.errors import LayoutError


def minmax_boundaries(costs: Sequence[float], num_stages: int) -> list[int]:
    """Return the boundaries of `num_stages` contiguous stages with the smallest possible largest cost.

    No stage is empty. Among the partitions with that largest cost, each stage in turn is brought as near as possible to the
    mean of what is left.

    Args:
        costs: cost of each layer, not negative; whole numbers are treated exactly, of any size.
        num_stages: between 1 and the number of layers.

    Returns:
        `num_stages + 1` layer indices; stage `s` holds layers `boundaries[s]` to `boundaries[s + 1] - 1`.

    Raises:
        LayoutError: if there are fewer layers than stages, or a cost is negative or not a number.

    Source: the linear partitioning problem (Skiena, The Algorithm Design Manual, section 10.7), solved by searching for the
        smallest limit under which filling each stage to the brim needs no more than `num_stages`.

    Example:
        >>> minmax_boundaries([1, 1, 1, 5], num_stages=2)
        [0, 3, 4]
    """
    _check(costs, num_stages)
    prefix = list(accumulate(costs, initial=0))
    limit = _smallest_limit(prefix, num_stages)
    earliest = _earliest_starts(prefix, limit, num_stages)
    num_layers = len(costs)
    boundaries = [0]
    for stage in range(num_stages - 1):
        start, num_left = boundaries[-1], num_stages - stage - 1
        first = max(start + 1, earliest[num_left])
        last = min(_reach(prefix, start, limit), num_layers - num_left)
        target = (prefix[-1] - prefix[start]) / (num_left + 1)
        boundaries.append(min(range(first, last + 1), key=lambda end: abs(prefix[end] - prefix[start] - target)))
    return [*boundaries, num_layers]


def stage_costs(costs: Sequence[float], boundaries: Sequence[int]) -> list[float]:
    """Return the cost of each stage.

    Example:
        >>> stage_costs([1, 2, 3], [0, 2, 3])
        [3, 3]
    """
    return [sum(costs[start:end]) for start, end in pairwise(boundaries)]


def _check(costs: Sequence[float], num_stages: int) -> None:
    if num_stages > len(costs):
        raise LayoutError(
            f"parallel.pp={num_stages} stages are more than the model's {len(costs)} layers, and a stage must not be empty; "
            f"try parallel.pp={len(costs)} or lower"
        )
    for layer_idx, cost in enumerate(costs):
        if not 0 <= cost < float("inf"):
            raise LayoutError(f"layer {layer_idx} has cost {cost}; costs must be finite and not negative")


def _smallest_limit(prefix: Sequence[float], num_stages: int) -> float:
    """Return the smallest stage cost that suffices, by bisection down to neighbouring numbers."""
    # A stage's cost is a difference of prefix sums throughout, so that rounding is everywhere the same.
    low, high = max(end - start for start, end in pairwise(prefix)), prefix[-1]
    if _num_stages_needed(prefix, low) <= num_stages:
        return low
    whole = all(isinstance(value, int) for value in prefix)
    while True:  # low does not suffice, high does
        middle = (low + high) // 2 if whole else low + (high - low) / 2
        if middle in (low, high):
            return high
        if _num_stages_needed(prefix, middle) <= num_stages:
            high = middle
        else:
            low = middle


def _num_stages_needed(prefix: Sequence[float], limit: float) -> int:
    start = count = 0
    while start < len(prefix) - 1:
        start = _reach(prefix, start, limit)
        count += 1
    return count


def _reach(prefix: Sequence[float], start: int, limit: float) -> int:
    """Return the last end of a stage that begins at `start` and costs no more than `limit`."""
    end = bisect_right(prefix, prefix[start] + limit) - 1
    # Adding and subtracting round differently; the cost of a stage is a difference.
    while end < len(prefix) - 1 and prefix[end + 1] - prefix[start] <= limit:
        end += 1
    while end > start + 1 and prefix[end] - prefix[start] > limit:
        end -= 1
    return end


def _earliest_starts(prefix: Sequence[float], limit: float, num_stages: int) -> list[int]:
    """Return, for each number of stages, the earliest layer from which so many can hold the rest of the model."""
    starts = [len(prefix) - 1]
    for _ in range(num_stages):
        end = start = starts[-1]
        while start > 0 and prefix[end] - prefix[start - 1] <= limit:
            start -= 1
        starts.append(start)
    return starts
