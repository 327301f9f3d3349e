"""The one algorithm under every balancing strategy: stages whose largest cost is as small as it can be."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate, pairwise
from numbers import Integral
from typing import SupportsFloat

from pipekit.errors import LayoutError
from pipekit.partitioners.even import most_even_boundaries


def minmax_boundaries(costs: Sequence[float], num_stages: int) -> list[int]:
    """Return the boundaries of `num_stages` contiguous stages with the smallest possible largest cost.

    No stage is empty. Among the partitions with that largest cost, it is one with the least sum of squared
    stage costs, so that the other stages are even too; of several such ones, the one whose boundaries come
    latest.

    Args:
        costs: cost of each layer, finite and not negative, of any size; there is no rounding.
        num_stages: between 1 and the number of layers.

    Returns:
        `num_stages + 1` layer indices; stage `s` holds layers `boundaries[s]` to `boundaries[s + 1] - 1`.

    Raises:
        LayoutError: if there are fewer layers than stages, or a cost is negative or not finite.

    Source: the linear partitioning problem (Skiena, The Algorithm Design Manual, section 10.7), solved by
        searching for the smallest limit under which filling each stage to the brim needs no more than
        `num_stages`.

    Example:
        >>> minmax_boundaries([1, 1, 1, 1, 9], num_stages=3)
        [0, 2, 4, 5]
    """
    _check(costs, num_stages)
    whole = _as_whole_numbers(costs)
    if not any(whole):
        whole = [1] * len(whole)
    prefix = list(accumulate(whole, initial=0))
    return most_even_boundaries(prefix, num_stages, limit=_smallest_limit(prefix, num_stages))


def stage_costs(costs: Sequence[float], boundaries: Sequence[int]) -> list[float]:
    """Return the cost of each stage.

    Example:
        >>> stage_costs([1, 2, 3], [0, 2, 3])
        [3, 3]
    """
    return [sum(costs[start:end]) for start, end in pairwise(boundaries)]


def _check(costs: Sequence[float], num_stages: int) -> None:
    if num_stages < 1:
        raise LayoutError(f"parallel.pp={num_stages} must be at least 1")
    if num_stages > len(costs):
        raise LayoutError(
            f"parallel.pp={num_stages} stages are more than the model's {len(costs)} layers, and a stage "
            f"must not be empty; try parallel.pp={len(costs)} or lower"
        )
    for layer_idx, cost in enumerate(costs):
        if not 0 <= cost < float("inf"):
            raise LayoutError(f"layer {layer_idx} has cost {cost}; costs must be finite and not negative")


def _as_whole_numbers(costs: Sequence[float]) -> list[int]:
    """Return the costs times a common power of two: every float is a whole number of halves of halves."""
    ratios = [_ratio(cost) for cost in costs]
    scale = max(denominator for _, denominator in ratios)
    return [numerator * (scale // denominator) for numerator, denominator in ratios]


def _ratio(cost: object) -> tuple[int, int]:
    """Return a number as a whole number and a power of two to divide it by."""
    if isinstance(cost, Integral):
        return int(cost), 1
    assert isinstance(cost, SupportsFloat)
    return float(cost).as_integer_ratio()


def _smallest_limit(prefix: Sequence[int], num_stages: int) -> int:
    """Return the smallest largest stage cost, by bisection."""
    largest, mean = max(end - start for start, end in pairwise(prefix)), -(-prefix[-1] // num_stages)
    low, high = max(largest, mean), mean + largest  # each stage filled up to `high` holds at least the mean
    while low < high:
        middle = (low + high) // 2
        if _fits(prefix, num_stages, middle):
            high = middle
        else:
            low = middle + 1
    return low


def _fits(prefix: Sequence[int], num_stages: int, limit: int) -> bool:
    """Return whether `num_stages` stages of at most `limit`, each filled to the brim, hold every layer."""
    start = 0
    for _ in range(num_stages):
        start = bisect_right(prefix, prefix[start] + limit, lo=start) - 1
    return start == len(prefix) - 1
