"""Min-max partitioning, the algorithm of every balancing method: it minimizes the largest cost of a stage."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from numbers import Integral
from typing import Any

from pipekit.errors import LayoutError
from pipekit.partitioners.even import most_even_boundaries
from pipekit.partitioners.memory_limit import MemoryLimit
from pipekit.partitioners.prefix_sums import Bound, Bounds, PrefixSums, can_fill


def minmax_boundaries(
    costs: Sequence[float],
    num_stages: int,
    *,
    stage_extras: Sequence[float] | None = None,
    memory: MemoryLimit | None = None,
) -> list[int]:
    """Return the boundaries of `num_stages` contiguous stages with the smallest possible largest cost.

    No stage is empty. Among the partitions with that largest cost, it returns one with the smallest sum of squared
    stage costs, so the other stages are even too; among several of these, the one whose boundaries come latest.

    Args:
        costs: cost of each layer, finite and not negative, of any size; there is no rounding.
        num_stages: between 1 and the number of layers.
        stage_extras: cost of each stage besides its layers; none by default.
        memory: memory limit of the stages, each on a separate rank; none by default.

    Returns:
        `num_stages + 1` layer indices; stage `s` holds layers `boundaries[s]` to `boundaries[s + 1] - 1`.

    Raises:
        LayoutError: if there are fewer layers than stages, a cost is negative or not finite, or the stages do not fit
            into the memory.

    Source: the linear partitioning problem (Skiena, The Algorithm Design Manual, section 10.7), solved by
        searching for the smallest limit under which filling each stage to the brim needs no more than
        `num_stages`.

    Example:
        >>> minmax_boundaries([1, 1, 1, 1, 9], num_stages=3)
        [0, 2, 4, 5]
        >>> minmax_boundaries([1, 1, 1, 1, 1, 1], num_stages=2, stage_extras=[0, 2])
        [0, 4, 6]
    """
    check_costs(costs, num_stages, stage_extras)
    whole, extras = as_integers(costs, [0] * num_stages if stage_extras is None else stage_extras)
    sums = PrefixSums.of(whole)
    memory_bounds: Sequence[Bounds] = [[]] * num_stages
    if memory is not None:
        memory.check(len(costs), num_stages)
        memory_bounds = _memory_bounds(memory)(int(memory.limit_bytes))
        if not can_fill(memory_bounds):
            raise memory.error(_smallest_need(memory), num_stages)

    def fits(limit: int) -> bool:
        pairs = zip(extras, memory_bounds, strict=True)
        return can_fill([[Bound(sums, limit - extra), *bounds] for extra, bounds in pairs])

    low = max(max(whole) + min(extras), max(extras) + min(whole), -(-(sum(whole) + sum(extras)) // num_stages))
    limit = smallest_integer(fits, low, sum(whole) + max(extras))
    return most_even_boundaries(
        sums.before, num_stages, limit=limit, stage_extras=extras, memory_bounds=memory_bounds if memory else None
    )


def stage_costs(
    costs: Sequence[float], boundaries: Sequence[int], stage_extras: Sequence[float] | None = None
) -> list[float]:
    """Return the cost of each stage.

    Example:
        >>> stage_costs([1, 2, 3], [0, 2, 3])
        [3, 3]
    """
    extras = [0] * (len(boundaries) - 1) if stage_extras is None else stage_extras
    return [sum(costs[start:end]) + extra for (start, end), extra in zip(pairwise(boundaries), extras, strict=True)]


def check_costs(
    costs: Sequence[float], num_stages: int, stage_extras: Sequence[float] | None = None, *, stages_per_rank: int = 1
) -> None:
    """Check that there are enough layers for the stages, and that costs are finite and not negative.

    Raises:
        LayoutError: if not.
    """
    if num_stages < 1:
        raise LayoutError(f"parallel.pp={num_stages} must be at least 1")
    if num_stages > len(costs):
        pp = num_stages // stages_per_rank
        product = f" x {stages_per_rank} on each rank, {num_stages}" if stages_per_rank > 1 else ""
        instead = (
            f"try parallel.pp={len(costs) // stages_per_rank} or lower"
            if len(costs) >= stages_per_rank
            else "try a schedule with fewer stages on each rank"
        )
        raise LayoutError(
            f"parallel.pp={pp}{product} stages are more than the model's {len(costs)} layers, and a stage "
            f"must not be empty; {instead}"
        )
    for layer_idx, cost in enumerate(costs):
        if not 0 <= cost < float("inf"):
            raise LayoutError(f"layer {layer_idx} has cost {cost}; costs must be finite and not negative")
    if stage_extras is None:
        return
    if len(stage_extras) != num_stages:
        raise LayoutError(
            f"stage_extras has {len(stage_extras)} entries, and must have one for each of the {num_stages} stages"
        )
    for stage, extra in enumerate(stage_extras):
        if not 0 <= extra < float("inf"):
            raise LayoutError(f"stage {stage} has the extra cost {extra}; costs must be finite and not negative")


def as_integers(costs: Sequence[float], stage_extras: Sequence[float]) -> tuple[list[int], list[int]]:
    """Costs and extras as integers, multiplied by a common power of two, which is exact for every float.

    If no layer costs anything, the extras alone would decide the largest cost. Then each layer costs 1 and the extras
    nothing, so the stages get equal numbers of layers.
    """
    if not any(costs):
        return [1] * len(costs), [0] * len(stage_extras)
    # numpy's whole numbers have no ratio.
    numbers: list[Any] = [*costs, *stage_extras]
    ratios = [(int(cost), 1) if isinstance(cost, Integral) else float(cost).as_integer_ratio() for cost in numbers]
    scale = max(denominator for _, denominator in ratios)
    whole = [numerator * (scale // denominator) for numerator, denominator in ratios]
    return whole[: len(costs)], whole[len(costs) :]


def smallest_integer(holds: Callable[[int], bool], low: int, high: int) -> int:
    """Smallest integer from `low` to `high` for which a monotone condition holds, by binary search.

    Example:
        >>> smallest_integer(lambda number: number**2 >= 50, 0, 50)
        8
    """
    while low < high:
        middle = (low + high) // 2
        if holds(middle):
            high = middle
        else:
            low = middle + 1
    return low


def _memory_bounds(memory: MemoryLimit) -> Callable[[int], list[Bounds]]:
    """Function from a limit in bytes to the bounds of every stage, alone on its rank."""
    sums, extras = memory.stage_sums(), [int(extra) for extra in memory.extra_bytes]
    return lambda limit: [[Bound(held, limit - extra)] for held, extra in zip(sums, extras, strict=True)]


def _smallest_need(memory: MemoryLimit) -> int:
    """Smallest possible bytes of the largest stage above the limit, over all partitions without an empty stage."""
    bounds = _memory_bounds(memory)
    most = max(sums.before[-1] for sums in memory.stage_sums()) + max(map(int, memory.extra_bytes))
    return smallest_integer(lambda limit: can_fill(bounds(limit)), int(memory.limit_bytes) + 1, most)
