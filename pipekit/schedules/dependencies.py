"""Dependencies between actions, and an order in which the actions of a table can run."""

from __future__ import annotations

from pipekit.schedules.action import Action
from pipekit.schedules.schedule import Schedule


def needs(action: Action, schedule: Schedule) -> tuple[Action, ...]:
    """Return the actions that must have ended before `action` begins.

    A forward needs the forward of the previous stage; a backward needs the forward of its stage and the backward of the
    next stage, whole or split; a weight gradient needs the input gradient of its stage.

    Example:
        >>> from pipekit.schedules import plan_zb_h1
        >>> schedule = plan_zb_h1(num_stages=2, num_micro_batches=2)
        >>> [str(other) for other in needs(Action.parse("0I1"), schedule)]
        ['0F1', '1I1']
    """
    stage, micro_batch = action.stage, action.micro_batch
    if action.kind == "F":
        return (Action(stage - 1, "F", micro_batch),) if stage > 0 else ()
    if action.kind == "W":
        return (Action(stage, "I", micro_batch),)
    own = Action(stage, "F", micro_batch)
    if stage == schedule.num_stages - 1:
        return (own,)
    split = (stage + 1, micro_batch) in schedule.split_backwards
    return own, Action(stage + 1, "I" if split else "B", micro_batch)


def dry_run(schedule: Schedule) -> tuple[list[tuple[int, Action]], dict[int, Action]]:
    """Dry-run a table: each rank runs the actions of its row in order, and sends never wait for the receiver.

    Returns:
        The actions with their ranks, in an order in which they can run; and for every rank that gets stuck, the action
        that it waits for forever.
    """
    order: list[tuple[int, Action]] = []
    done: set[Action] = set()
    positions = [0] * len(schedule.ranks)
    waiting: dict[Action, set[int]] = {}
    ready = list(range(len(schedule.ranks)))
    while ready:
        # A rank goes on as far as it can; what it ends may let those that wait for it go on.
        rank = ready.pop()
        actions = schedule.ranks[rank]
        while positions[rank] < len(actions):
            action = actions[positions[rank]]
            missing = next((other for other in needs(action, schedule) if other not in done), None)
            if missing is not None:
                waiting.setdefault(missing, set()).add(rank)
                break
            order.append((rank, action))
            done.add(action)
            positions[rank] += 1
            ready += waiting.pop(action, ())
    return order, {rank: missing for missing, ranks in waiting.items() for rank in ranks}
