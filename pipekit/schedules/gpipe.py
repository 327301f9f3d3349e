"""GPipe: all forwards, then all backwards."""

from __future__ import annotations

from pipekit.schedules.action import Action
from pipekit.schedules.schedule import Schedule


def plan_gpipe(*, num_stages: int, num_micro_batches: int) -> Schedule:
    """Return the GPipe table, with one stage per rank. Every stage holds all micro-batches in flight.

    The backwards run in the order of the forwards, so gradients accumulate in the same order as under 1F1B.

    Source: Huang et al. 2019, "GPipe: Efficient Training of Giant Neural Networks using Pipeline Parallelism".

    Example:
        >>> print(plan_gpipe(num_stages=2, num_micro_batches=2))
        0F0 0F1 0B0 0B1
        1F0 1F1 1B0 1B1
    """
    ranks = tuple(
        tuple(Action(stage, kind, micro_batch) for kind in ("F", "B") for micro_batch in range(num_micro_batches))
        for stage in range(num_stages)
    )
    return Schedule("gpipe", num_micro_batches, ranks)
