"""Zero-bubble H1: 1F1B with split backwards, whose weight gradients fill idle time."""

from __future__ import annotations

from pipekit.schedules.action import Action
from pipekit.schedules.schedule import Schedule


def plan_zb_h1(*, num_stages: int, num_micro_batches: int) -> Schedule:
    """Return the ZB-H1 table, with one stage per rank.

    Stage `s` warms up as under 1F1B, and delays its weight gradients by `s` micro-batches, so it still has that many to
    run at the end, when it would wait for other stages. No stage holds more micro-batches than the first stage of 1F1B.

    Source: Qi et al. 2023, "Zero Bubble Pipeline Parallelism", section 3.1.

    Example:
        >>> print(plan_zb_h1(num_stages=2, num_micro_batches=3))
        0F0 0F1 0I0 0W0 0F2 0I1 0W1 0I2 0W2
        1F0 1I0 1F1 1I1 1W0 1F2 1I2 1W1 1W2
    """
    ranks = []
    for stage in range(num_stages):
        num_warmup = min(num_stages - stage - 1, num_micro_batches)
        actions = [Action(stage, "F", micro_batch) for micro_batch in range(num_warmup)]
        for micro_batch in range(num_micro_batches):
            if num_warmup + micro_batch < num_micro_batches:
                actions.append(Action(stage, "F", num_warmup + micro_batch))
            actions.append(Action(stage, "I", micro_batch))
            if micro_batch >= stage:
                actions.append(Action(stage, "W", micro_batch - stage))
        first_left = max(0, num_micro_batches - stage)
        actions += [Action(stage, "W", micro_batch) for micro_batch in range(first_left, num_micro_batches)]
        ranks.append(tuple(actions))
    return Schedule("zb-h1", num_micro_batches, tuple(ranks))
