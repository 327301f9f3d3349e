"""Messages between the ranks of a schedule, in order, read off the table."""

from __future__ import annotations

from pipekit.schedules.action import Action
from pipekit.schedules.schedule import Schedule


def destination(action: Action, schedule: Schedule) -> int | None:
    """Return the stage to which an action's result goes: activations up, input gradients down; None if it stays."""
    if action.kind == "F":
        return action.stage + 1 if action.stage + 1 < schedule.num_stages else None
    if action.kind in "BI":
        return action.stage - 1 if action.stage > 0 else None
    return None


def name_result(action: Action) -> str:
    """Name of an action's result in messages for users.

    Example:
        >>> name_result(Action.parse("0F3")), name_result(Action.parse("2B1"))
        ('the output of 0F3', 'the input gradient of 2B1')
    """
    return f"the {'output' if action.kind == 'F' else 'input gradient'} of {action}"


def plan_messages(schedule: Schedule) -> dict[tuple[int, int], tuple[Action, ...]]:
    """Return, for each ordered pair of ranks, the actions of the first whose results go to the second, in order.

    A channel keeps the order of its messages, so the second rank must receive them in this order too.

    Example:
        >>> from pipekit.schedules import plan_1f1b
        >>> {pair: " ".join(map(str, sent)) for pair, sent in plan_messages(plan_1f1b(num_stages=2,
        ...     num_micro_batches=3)).items()}
        {(0, 1): '0F0 0F1 0F2', (1, 0): '1B0 1B1 1B2'}
    """
    messages: dict[tuple[int, int], list[Action]] = {}
    for rank, actions in enumerate(schedule.ranks):
        for action in actions:
            stage = destination(action, schedule)
            if stage is not None and schedule.placement[stage] != rank:
                messages.setdefault((rank, schedule.placement[stage]), []).append(action)
    return {pair: tuple(sent) for pair, sent in messages.items()}
