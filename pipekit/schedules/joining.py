"""Whole backwards in place of split ones, wherever splitting gains nothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import replace

from pipekit.schedules.action import Action
from pipekit.schedules.schedule import Schedule
from pipekit.schedules.simulate import Costs, simulate

# The share of a mean forward by which messages may be late without a longer step.
_LATE_MESSAGES = 0.1

# In larger tables all stages join alike: to try each by itself takes longer than it gains.
_MOST_ACTIONS = 2000


def join_backwards(schedule: Schedule, costs: Costs) -> Schedule:
    """Return the table with whole backwards for as many of each stage's first micro-batches as leave the step as long.

    A split backward costs more than simulation knows: its weight gradients come back to what has left the caches, and
    its activations are held for longer. What pays for that is the end of a step, where ranks would wait otherwise, so
    that the last micro-batches stay split. The step gets no longer for messages that come late either.

    Example:
        >>> from pipekit.schedules import plan_zb_h1
        >>> print(join_backwards(plan_zb_h1(num_stages=2, num_micro_batches=4), Costs.uniform(2)))
        0F0 0F1 0B0 0F2 0B1 0F3 0B2 0B3
        1F0 1I0 1F1 1I1 1W0 1F2 1I2 1W1 1F3 1I3 1W2 1W3
    """
    forward_s = sum(costs.forward_s) / costs.num_stages
    conditions = (costs, replace(costs, transfer_s=costs.transfer_s + _LATE_MESSAGES * forward_s))
    limits_s = [simulate(schedule, condition).step_time_s * (1 + 1e-9) for condition in conditions]

    def is_as_short(candidate: Schedule) -> bool:
        return all(
            simulate(candidate, condition).step_time_s <= limit_s
            for condition, limit_s in zip(conditions, limits_s, strict=True)
        )

    schedule = _join_most(schedule, range(schedule.num_stages), is_as_short)
    if sum(map(len, schedule.ranks)) <= _MOST_ACTIONS:
        for stage in range(schedule.num_stages):
            schedule = _join_most(schedule, [stage], is_as_short)
    return schedule


def _join_most(schedule: Schedule, stages: Sequence[int], accepts: Callable[[Schedule], bool]) -> Schedule:
    """Return the table with whole backwards for the first split ones of each of some stages, as many as is accepted.

    Halving finds the largest number if a smaller one is never worse; if not, one that is accepted all the same.
    """
    splits = {stage: sorted(batch for other, batch in schedule.split_backwards if other == stage) for stage in stages}
    fewest, most = 0, max(map(len, splits.values()))
    while fewest < most:
        middle = (fewest + most + 1) // 2
        if accepts(_join(schedule, {stage: set(batches[:middle]) for stage, batches in splits.items()})):
            fewest = middle
        else:
            most = middle - 1
    return _join(schedule, {stage: set(batches[:fewest]) for stage, batches in splits.items()})


def _join(schedule: Schedule, joined: Mapping[int, Set[int]]) -> Schedule:
    """Return the table with whole backwards for some micro-batches of some stages, in the places of input gradients."""
    ranks = []
    for actions in schedule.ranks:
        row = []
        for action in actions:
            is_joined = action.kind in "IW" and action.micro_batch in joined.get(action.stage, ())
            if not is_joined:
                row.append(action)
            elif action.kind == "I":
                row.append(Action(action.stage, "B", action.micro_batch))
        ranks.append(tuple(row))
    return Schedule(schedule.name, schedule.num_micro_batches, tuple(ranks))
