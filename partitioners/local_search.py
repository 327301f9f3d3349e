"""Local search that improves a partition by moving boundaries."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise

_MAX_ROUNDS = 1000  # some tens are the most that was seen


@dataclass(frozen=True)
class StageSums:
    """Sums over the layers of each stage, in whole numbers, such as costs or bytes.

    Attributes:
        before: for each stage, sums of the first 0, 1, ... layers as they would count in that stage.
        extras: value of each stage besides its layers.
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
    """Move boundaries until no single move improves the partition, and return them.

    With `together`, it also moves neighbouring boundaries by one layer at once, which passes a layer from one stage to
    another across the stages between them.

    Partitions are compared by the bytes by which ranks exceed the limit, then by the largest cost of a rank, then by
    the sum of the ranks' squared costs; smaller is better.

    Args:
        boundaries: boundaries to start from.
        placement: the rank of each stage.
        costs: costs of the stages.
        memory: bytes of the stages, and the limit of a rank; no limit by default.
        together: whether to move several boundaries at once too.

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
