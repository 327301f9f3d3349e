"""1F1B, one forward, one backward: the schedule that bounds in-flight activations by the number of stages."""

from __future__ import annotations

from collections.abc import Sequence

from pipekit.schedules.action import Action
from pipekit.schedules.schedule import Schedule


def plan_1f1b(*, num_stages: int, num_micro_batches: int) -> Schedule:
    """Return the 1F1B table, with one stage per rank.

    A rank first runs as many forwards as there are stages after its own, then alternates forwards and backwards, and
    then runs the remaining backwards. Stage `s` of `S` holds at most `S - s` micro-batches in flight.

    Source: Narayanan et al. 2021, "Efficient Large-Scale Language Model Training on GPU Clusters Using Megatron-LM",
    section 2.2 (PipeDream-Flush).

    Example:
        >>> print(plan_1f1b(num_stages=2, num_micro_batches=3))
        0F0 0F1 0B0 0F2 0B1 0B2
        1F0 1B0 1F1 1B1 1F2 1B2
    """
    ranks = []
    for stage in range(num_stages):
        num_warmup = min(num_stages - stage - 1, num_micro_batches)
        actions = [Action(stage, "F", micro_batch) for micro_batch in range(num_warmup)]
        for micro_batch in range(num_micro_batches - num_warmup):
            actions.append(Action(stage, "F", num_warmup + micro_batch))
            actions.append(Action(stage, "B", micro_batch))
        first_left = num_micro_batches - num_warmup
        actions += [Action(stage, "B", micro_batch) for micro_batch in range(first_left, num_micro_batches)]
        ranks.append(tuple(actions))
    return Schedule("1f1b", num_micro_batches, tuple(ranks))


def plan_forward_only(*, num_stages: int, num_micro_batches: int, placement: Sequence[int] | None = None) -> Schedule:
    """Return the table of an evaluation: every stage runs only forwards, one per micro-batch.

    Example:
        >>> print(plan_forward_only(num_stages=2, num_micro_batches=2))
        0F0 0F1
        1F0 1F1
    """
    placement = range(num_stages) if placement is None else placement
    ranks: list[list[Action]] = [[] for _ in range(max(placement) + 1)]
    # A whole pass of a micro-batch before the next: whatever the placement, no rank waits for one that waits for it.
    for micro_batch in range(num_micro_batches):
        for stage, rank in enumerate(placement):
            ranks[rank].append(Action(stage, "F", micro_batch))
    return Schedule("forward-only", num_micro_batches, tuple(map(tuple, ranks)))
