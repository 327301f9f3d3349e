"""Acknowledgements: messages of a pipeline peer that confirm the receipt of other messages, planned from the table."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from pipekit.schedules.action import Action
from pipekit.schedules.dependencies import needs
from pipekit.schedules.messages import plan_messages
from pipekit.schedules.schedule import Schedule


@dataclass(frozen=True)
class Acknowledgements:
    """Messages from one rank to another whose receipt is confirmed by the messages that come back.

    Attributes:
        used: actions whose results the first rank sends to the second, in the order in which the second's row uses
            them.
        confirmed: for each action of the second rank whose result comes back, the number of `used` actions, counted
            from the first, whose receipt it confirms.
    """

    used: tuple[Action, ...]
    confirmed: Mapping[Action, int]


def plan_acknowledgements(schedule: Schedule, pipe_rank: int) -> dict[int, Acknowledgements]:
    """Return the acknowledgements of every rank that `pipe_rank` sends to.

    A rank runs the actions of its row in order. So when the result of an action arrives, that rank has received all
    inputs of this action and of the earlier ones in its row.

    Example:
        >>> from pipekit.schedules import plan_zb_h1
        >>> schedule = plan_zb_h1(num_stages=2, num_micro_batches=3)
        >>> print(schedule)
        0F0 0F1 0I0 0W0 0F2 0I1 0W1 0I2 0W2
        1F0 1I0 1F1 1I1 1W0 1F2 1I2 1W1 1W2
        >>> acknowledgements = plan_acknowledgements(schedule, 1)[0]
        >>> [str(action) for action in acknowledgements.used]
        ['1I0', '1I1', '1I2']
        >>> {str(action): count for action, count in acknowledgements.confirmed.items()}
        {'0F0': 0, '0F1': 0, '0F2': 1}
    """
    messages = plan_messages(schedule)
    acknowledgements = {}
    for (source, peer), sent in messages.items():
        if source != pipe_rank:
            continue
        outgoing, incoming = set(sent), set(messages.get((peer, pipe_rank), ()))
        used: list[Action] = []
        confirmed = {}
        for action in schedule.ranks[peer]:
            used += [other for other in needs(action, schedule) if other in outgoing]
            if action in incoming:
                confirmed[action] = len(used)
        acknowledgements[peer] = Acknowledgements(tuple(used), confirmed)
    return acknowledgements
