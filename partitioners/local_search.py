"""Partitions made better by moving one boundary at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
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

    def ranks(self, boundaries: Sequence[int], placement: Sequence[int]) -> list[int]:
        """Cost of every rank."""
        held = [0] * (max(placement) + 1)
        stages = zip(placement, self.before, self.extras, pairwise(boundaries), strict=True)
        for rank, before, extra, (start, end) in stages:
            held[rank] += before[end] - before[start] + extra
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

    def badness(cuts: Sequence[int]) -> tuple[int, int, int]:
        held = costs.ranks(cuts, placement)
        excess = sum(max(0, size - memory[1]) for size in memory[0].ranks(cuts, placement)) if memory else 0
        return excess, max(held), sum(cost**2 for cost in held)

    cuts = list(boundaries)
    for _ in range(_MAX_ROUNDS):
        before = cuts
        for stage in range(1, len(placement)):
            places = range(cuts[stage - 1] + 1, cuts[stage + 1])
            cuts = min(cuts, *([*cuts[:stage], place, *cuts[stage + 1 :]] for place in places), key=badness)
        if cuts == before and together:
            now = badness(cuts)
            cuts = next((handed for handed in _hand_on_a_layer(cuts) if badness(handed) < now), cuts)
        if cuts == before:
            break
    return cuts


def _hand_on_a_layer(cuts: Sequence[int]) -> Iterator[list[int]]:
    """Boundaries of which some neighbouring ones are moved by a layer: every way from one stage to another."""
    for first, last in combinations(range(len(cuts) - 1), 2):
        for giver, step in ((last, 1), (first, -1)):
            if cuts[giver + 1] - cuts[giver] > 1:
                yield [cut + step * (first < stage <= last) for stage, cut in enumerate(cuts)]
