"""Partitions made better by moving one boundary at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise

_MAX_ROUNDS = 1000  # some tens are the most that was seen


@dataclass(frozen=True)
class StageSums:
    """Something that layers add up to in the stages, in whole numbers, such as costs or bytes.

    Attributes:
        before: for each stage, sums of the first 0, 1, ... layers as they would count in it.
        extras: what each stage has beside its layers.
    """

    before: Sequence[Sequence[int]]
    extras: Sequence[int]

    def stage(self, stage: int, start: int, end: int) -> int:
        """Cost of a stage of the layers from `start` up to `end`."""
        return self.before[stage][end] - self.before[stage][start] + self.extras[stage]

    def ranks(self, boundaries: Sequence[int], placement: Sequence[int]) -> list[int]:
        """Cost of every rank."""
        held = [0] * (max(placement) + 1)
        for stage, (start, end) in enumerate(pairwise(boundaries)):
            held[placement[stage]] += self.stage(stage, start, end)
        return held


def improve_boundaries(
    boundaries: Sequence[int],
    placement: Sequence[int],
    costs: StageSums,
    *,
    memory: tuple[StageSums, int] | None = None,
    together: bool = False,
) -> list[int]:
    """Return boundaries of which no single one can be moved to advantage.

    With `together`, nor can any neighbouring ones be moved by a layer at once, which hands a layer from one stage to
    another over those between them.

    A partition is better if the ranks' bytes beyond the limit are fewer; then, if the largest cost of a rank is
    smaller; then, if the sum of the ranks' squared costs is.

    Args:
        boundaries: where to begin.
        placement: the rank of each stage.
        costs: what stages cost.
        memory: their bytes, and the most that a rank may hold; nothing is limited unless given.
        together: whether to move several at once too.

    Example:
        >>> costs = StageSums([range(9)] * 4, [0] * 4)
        >>> improve_boundaries([0, 1, 2, 3, 8], (0, 1, 0, 1), costs)
        [0, 1, 2, 5, 8]
    """
    cuts = list(boundaries)
    for _ in range(_MAX_ROUNDS):
        changed = False
        for stage in range(1, len(placement)):
            best = _best_cut(cuts, stage, placement, costs, memory)
            changed = changed or best != cuts[stage]
            cuts[stage] = best
        if not changed:
            handed = _hand_on_a_layer(cuts, placement, costs, memory) if together else None
            if handed is None:
                break
            cuts = handed
    return cuts


def _best_cut(
    cuts: Sequence[int],
    stage: int,
    placement: Sequence[int],
    costs: StageSums,
    memory: tuple[StageSums, int] | None,
) -> int:
    """Return the best place for the boundary before `stage`, between its neighbours; where it is, unless another is
    better."""
    start, now, end = cuts[stage - 1 : stage + 2]
    pair = placement[stage - 1], placement[stage]

    def rest(sums: StageSums) -> tuple[int, int, int]:
        """Costs of both ranks' other stages, and the largest cost of any other rank."""
        held = sums.ranks(cuts, placement)
        held[pair[0]] -= sums.stage(stage - 1, start, now)
        held[pair[1]] -= sums.stage(stage, now, end)
        return held[pair[0]], held[pair[1]], max((h for rank, h in enumerate(held) if rank not in pair), default=0)

    def both(sums: StageSums, others: tuple[int, int, int], cut: int) -> tuple[int, int]:
        """Costs of both ranks with the boundary at `cut`; where they are one rank, its cost and 0."""
        left, right = sums.stage(stage - 1, start, cut), sums.stage(stage, cut, end)
        return (others[0] + left + right, 0) if pair[0] == pair[1] else (others[0] + left, others[1] + right)

    rest_costs = rest(costs)
    rest_bytes = rest(memory[0]) if memory else (0, 0, 0)

    def badness(cut: int) -> tuple[int, int, int]:
        excess = 0
        if memory:
            excess = sum(max(0, held - memory[1]) for held in both(memory[0], rest_bytes, cut))
        loads = both(costs, rest_costs, cut)
        return excess, max(*loads, rest_costs[2]), sum(load**2 for load in loads)

    best = min(range(start + 1, end), key=badness)
    return best if badness(best) < badness(now) else now


def _hand_on_a_layer(
    cuts: Sequence[int], placement: Sequence[int], costs: StageSums, memory: tuple[StageSums, int] | None
) -> list[int] | None:
    """Return better boundaries, of which some neighbouring ones are moved by a layer; None if there are none."""

    def badness(boundaries: Sequence[int]) -> tuple[int, int, int]:
        loads = costs.ranks(boundaries, placement)
        held = memory[0].ranks(boundaries, placement) if memory else []
        excess = sum(max(0, size - memory[1]) for size in held) if memory else 0
        return excess, max(loads), sum(load**2 for load in loads)

    now = badness(cuts)
    for first, last in combinations(range(len(placement)), 2):
        # From stage `last` to stage `first`, and the other way.
        for giver, step in ((last, 1), (first, -1)):
            if cuts[giver + 1] - cuts[giver] > 1:
                moved = [cut + step * (first < stage <= last) for stage, cut in enumerate(cuts)]
                if badness(moved) < now:
                    return moved
    return None
