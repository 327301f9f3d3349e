"""Merging of split backwards into whole ones, wherever splitting gains nothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import replace

from pipekit.schedules.action import Action
from pipekit.schedules.schedule import Schedule
from pipekit.schedules.simulate import Costs, simulate

# The fraction of a mean forward by which messages may be late without lengthening the step.
_LATE_MESSAGES = 0.1

# In larger tables all stages merge the same number: trying each stage by itself takes longer than it gains.
_MOST_ACTIONS = 2000


def merge_backwards(schedule: Schedule, costs: Costs) -> Schedule:
    """Merge the split backwards of the first micro-batches of each stage, as many as do not lengthen the step.

    A split backward costs more than the simulation counts: its weight gradients read data that has left the caches, and
    its activations are held for longer. It pays off at the end of a step, where ranks would otherwise wait, so the last
    micro-batches stay split. The merged step does not get longer if messages come late, either.

    Example:
        >>> from pipekit.schedules import plan_zb_h1
        >>> print(merge_backwards(plan_zb_h1(num_stages=2, num_micro_batches=4), Costs.uniform(2)))
        0F0 0F1 0B0 0F2 0B1 0F3 0B2 0B3
        1F0 1I0 1F1 1I1 1W0 1F2 1I2 1W1 1F3 1I3 1W2 1W3
    """
    forward_s = sum(costs.forward_s) / costs.num_stages
    conditions = (costs, replace(costs, transfer_s=costs.transfer_s + _LATE_MESSAGES * forward_s))
    limits_s = [simulate(schedule, condition).step_time_s * (1 + 1e-9) for condition in conditions]

    def is_as_short(candidate: Schedule) -> bool:
        limits = zip(conditions, limits_s, strict=True)
        return all(simulate(candidate, condition).step_time_s <= limit_s for condition, limit_s in limits)

    schedule = _merge_most(schedule, range(schedule.num_stages), is_as_short)
    if sum(map(len, schedule.ranks)) <= _MOST_ACTIONS:
        for stage in range(schedule.num_stages):
            schedule = _merge_most(schedule, [stage], is_as_short)
    return schedule


def _merge_most(schedule: Schedule, stages: Sequence[int], accepts: Callable[[Schedule], bool]) -> Schedule:
    """Merge the first split backwards of each of some stages, as many as `accepts` allows.

    Bisection finds the largest number if a smaller one is never worse; if not, some number that is accepted.
    """
    splits = {stage: sorted(batch for other, batch in schedule.split_backwards if other == stage) for stage in stages}
    fewest, most = 0, max(map(len, splits.values()))
    while fewest < most:
        middle = (fewest + most + 1) // 2
        if accepts(_merge(schedule, {stage: set(batches[:middle]) for stage, batches in splits.items()})):
            fewest = middle
        else:
            most = middle - 1
    return _merge(schedule, {stage: set(batches[:fewest]) for stage, batches in splits.items()})


def _merge(schedule: Schedule, merged: Mapping[int, Set[int]]) -> Schedule:
    """Merge the split backwards of some micro-batches of some stages; the whole one stands where its `I` stood."""
    ranks = []
    for actions in schedule.ranks:
        row = []
        for action in actions:
            is_merged = action.kind in "IW" and action.micro_batch in merged.get(action.stage, ())
            if not is_merged:
                row.append(action)
            elif action.kind == "I":
                row.append(Action(action.stage, "B", action.micro_batch))
        ranks.append(tuple(row))
    return Schedule(schedule.name, schedule.num_micro_batches, tuple(ranks))
