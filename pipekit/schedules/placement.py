"""Placement of stages: the pipeline rank of each."""

from __future__ import annotations

from typing import Literal


def plan_placement(kind: Literal["looped", "v"], *, pp: int, stages_per_rank: int = 1) -> tuple[int, ...]:
    """Return the pipeline rank of each of `pp * stages_per_rank` stages.

    `looped` starts again at the first rank after the last; `v` turns around at the ends, where two neighbouring stages
    are on one rank. With one stage per rank they are the same.

    Example:
        >>> plan_placement("looped", pp=3, stages_per_rank=2)
        (0, 1, 2, 0, 1, 2)
        >>> plan_placement("v", pp=3, stages_per_rank=2)
        (0, 1, 2, 2, 1, 0)
    """
    placement: list[int] = []
    for turn in range(stages_per_rank):
        down = kind == "looped" or turn % 2 == 0
        placement += range(pp) if down else range(pp - 1, -1, -1)
    return tuple(placement)
