"""Balanced partitions: ranks of equal cost, under any placement of stages."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pipekit.errors import LayoutError
from pipekit.partitioners.local_search import StageSums, improve_boundaries
from pipekit.partitioners.memory_limit import MemoryLimit
from pipekit.partitioners.minmax import as_integers, check_costs, minmax_boundaries
from pipekit.partitioners.prefix_sums import PrefixSums, in_few_bits
from pipekit.partitioners.two_stages import LARGEST_SUM, Resource, smallest_limit_boundaries

_LARGEST_TOTAL = LARGEST_SUM // 2


def balanced_boundaries(
    costs: Sequence[float],
    placement: Sequence[int],
    *,
    stage_extras: Sequence[float] | None = None,
    memory: MemoryLimit | None = None,
) -> list[int]:
    """Return the boundaries of contiguous stages that minimize the largest cost of a rank.

    No stage is empty. The cost of a rank is the sum over its stages, including their extras.

    - With one stage per rank, this is `minmax_boundaries`: it is exact, and the other ranks are as even as possible.
    - With two stages per rank, placed as a V `(0, 1, 1, 0)` or looped `(0, 1, 0, 1)`, it is exact, with or without a
      memory limit. Then boundaries are moved one at a time as long as that makes the ranks more even. Costs whose total
      exceeds 2**60, in units of their greatest common divisor, are rounded down to 60 bits of the total, a hundredth of
      the precision of a float.
    - With more stages, or another placement, it is a local search, and not exact. It starts from the partition with the
      smallest largest stage, and moves boundaries, one at a time or neighbouring ones by one layer at once, as long as
      that makes the largest rank smaller or the ranks more even. Under a memory limit it may miss partitions that fit.

    Args:
        costs: cost of each layer, finite and not negative.
        placement: the pipeline rank of each stage, from 0.
        stage_extras: cost of each stage besides its layers, such as the loss on the last; none by default.
        memory: memory limit of the ranks; none by default.

    Returns:
        One more layer index than stages; stage `s` holds layers `boundaries[s]` to `boundaries[s + 1] - 1`.

    Raises:
        LayoutError: if there are fewer layers than stages, a cost is negative or not finite, a stage or layer has no
            number, or the stages do not fit into the memory.

    Example:
        >>> balanced_boundaries([1, 1, 1, 1, 1, 1, 1, 5], (0, 1, 1, 0))
        [0, 1, 5, 7, 8]
        >>> balanced_boundaries([1, 1, 1, 1, 1, 1], (0, 1), stage_extras=[0, 2])
        [0, 4, 6]
    """
    num_stages, pp = len(placement), len(set(placement))
    if set(placement) != set(range(pp)):
        raise LayoutError(
            f"the placement {tuple(placement)} must hold every rank from 0 to {max(placement, default=0)}"
        )
    check_costs(costs, num_stages, stage_extras, stages_per_rank=max(1, num_stages // max(pp, 1)))
    if num_stages == pp:
        return minmax_boundaries(costs, num_stages, stage_extras=stage_extras, memory=memory)
    whole, extras = as_integers(costs, [0] * num_stages if stage_extras is None else stage_extras)
    cost_sums = StageSums([PrefixSums.of(whole).before] * num_stages, extras)
    limit: tuple[StageSums, int] | None = None
    if memory is not None:
        memory.check(len(costs), num_stages)
        limit = memory.held(), int(memory.limit_bytes)
    found = minmax_boundaries(costs, num_stages, stage_extras=stage_extras)
    nested = num_stages == 2 * pp and all(placement[stage] == placement[-1 - stage] for stage in range(pp))
    looped = num_stages == 2 * pp and all(placement[stage] == placement[stage + pp] for stage in range(pp))
    found = improve_boundaries(found, placement, cost_sums, memory=limit, together=not (nested or looped))
    fits = limit is None or max(limit[0].ranks(found, placement)) <= limit[1]
    if nested or looped:
        exact = _two_stages_a_rank(_in_60_bits(cost_sums), limit, nested=nested, incumbent=found if fits else None)
        if exact is not None:
            return improve_boundaries(exact, placement, cost_sums, memory=limit)
    if limit is not None and not fits:
        assert memory is not None
        need = max(limit[0].ranks(found, placement))
        if nested or looped:
            least = _two_stages_a_rank(limit[0], None, nested=nested, incumbent=None)
            assert least is not None
            need = max(limit[0].ranks(least, placement))
        raise memory.error(need, pp, is_least=nested or looped)
    return found


def _two_stages_a_rank(
    sums: StageSums, limit: tuple[StageSums, int] | None, *, nested: bool, incumbent: Sequence[int] | None
) -> list[int] | None:
    """Return the boundaries under which the fullest rank holds as little as it can, within a limit of something else.

    None if there are none within the limit.
    """
    resource = _resource(sums)
    least_total = sum(resource.extras) + min(int(before[-1]) for before in resource.before)
    return smallest_limit_boundaries(
        resource,
        nested=nested,
        low=-(-least_total // (len(resource.extras) // 2)),
        incumbent=incumbent,
        within=None if limit is None else (_resource(limit[0]), min(limit[1], LARGEST_SUM)),
    )


def _resource(sums: StageSums) -> Resource:
    arrays = {id(before): np.array(before, dtype=np.int64) for before in sums.before}
    return Resource([arrays[id(before)] for before in sums.before], sums.extras)


def _in_60_bits(sums: StageSums) -> StageSums:
    """Return sums that stand to one another as these do, as nearly as they can in 60 bits."""
    (before,) = {id(before): before for before in sums.before}.values()
    if before[-1] + sum(sums.extras) <= _LARGEST_TOTAL:
        return sums
    small_before, small_extras = in_few_bits(before, sums.extras, _LARGEST_TOTAL)
    return StageSums([small_before] * len(sums.before), small_extras)
