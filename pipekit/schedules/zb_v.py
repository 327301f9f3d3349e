"""ZB-V: two stages per rank, placed in a V, and weight gradients wherever a rank would be idle."""

from __future__ import annotations

from pipekit.schedules.action import Action, ActionKind
from pipekit.schedules.fill_bubbles import fill_bubbles
from pipekit.schedules.schedule import Schedule
from pipekit.schedules.simulate import Costs


def plan_zb_v(*, pp: int, num_micro_batches: int) -> Schedule:
    """Return the ZB-V table: `2 * pp` stages, with the first and the last on the first rank.

    The first rank computes the loss, so its backward starts at once, and a rank waits for little except its first
    input: with equal costs and at least `pp` micro-batches, the bubble is the time of `pp - 1` forwards of a stage. No
    rank holds more than `2 * pp` stage activations, which take as much memory as `pp` of 1F1B's stages, which are twice
    as long.

    Every rank repeats a block of six actions: both forwards, both input gradients, and two weight gradients, which it
    holds back as under ZB-H1. On the way up the V, a message has the time of four actions to arrive, so short transfers
    lengthen a step by the same time for any number of micro-batches.

    Source: Qi et al. 2023, "Zero Bubble Pipeline Parallelism", section 6; Qi et al. 2024, "Pipeline Parallelism with
    Controllable Memory", whose method of repeated building blocks it follows.

    Example:
        >>> print(plan_zb_v(pp=2, num_micro_batches=1))
        0F0 3F0 3I0 3W0 0I0 0W0
        1F0 2F0 2I0 1I0 2W0 1W0
    """
    order = Schedule("zb-v", num_micro_batches, tuple(_order(rank, pp, num_micro_batches) for rank in range(pp)))
    costs, limit = Costs.uniform(2 * pp), 2 * pp
    schedule = fill_bubbles(order, costs, max_in_flight=limit, hold_back=range(pp), patience=0.5, name="zb-v")
    assert schedule is not None, "the block keeps to the limit"
    return schedule


def _order(rank: int, pp: int, num_micro_batches: int) -> tuple[Action, ...]:
    """Return a rank's forwards and input gradients in order of their time.

    A micro-batch goes down the V by a rank in every unit of time, and up by a rank in every five; the next follows it
    after six. So a rank has one of the four in each of the units `rank` to `rank + 3` of every six.
    """
    up = 5 * (pp - 1 - rank)
    begins: dict[tuple[int, ActionKind], int] = {
        (rank, "F"): rank,
        (2 * pp - 1 - rank, "F"): pp + up,
        (2 * pp - 1 - rank, "I"): 6 * pp - 4 + rank,
        (rank, "I"): 7 * pp - 4 + up,
    }
    timed = [
        (begin + 6 * micro_batch, stage, kind, micro_batch)
        for (stage, kind), begin in begins.items()
        for micro_batch in range(num_micro_batches)
    ]
    return tuple(Action(stage, kind, micro_batch) for _, stage, kind, micro_batch in sorted(timed))
