"""Bubble filling: weight gradients moved into the bubbles of a table whose other actions are already in order."""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Sequence

from pipekit.schedules.action import Action
from pipekit.schedules.schedule import Schedule
from pipekit.schedules.simulate import Costs


def fill_bubbles(
    schedule: Schedule,
    costs: Costs,
    *,
    max_in_flight: int,
    hold_back: Sequence[int],
    patience: float,
    name: str,
) -> Schedule | None:
    """Split each backward, and move its weight gradient into the bubbles, where the rank would wait.

    Forwards and input gradients keep their order. A weight gradient runs if the inputs of the rank's next action have
    not arrived, if a forward needs the memory, or if more weight gradients wait than the rank may hold back.

    Args:
        schedule: schedule whose order of forwards and backwards to keep.
        costs: costs of the actions, from which it follows when a rank would wait.
        max_in_flight: largest number of stage activations that a rank may hold.
        hold_back: for each rank, the number of weight gradients that may wait while it has other work.
        patience: time that a rank waits for other work before it runs a weight gradient, in weight gradients.

    Returns:
        The table, or None if the order of its forwards cannot keep to `max_in_flight`.

    Example:
        >>> from pipekit.schedules import plan_1f1b
        >>> print(fill_bubbles(plan_1f1b(num_stages=2, num_micro_batches=3), Costs.uniform(2),
        ...     max_in_flight=2, hold_back=(0, 1), patience=0.0, name="mine"))
        0F0 0F1 0I0 0W0 0F2 0I1 0W1 0I2 0W2
        1F0 1I0 1F1 1I1 1W0 1F2 1I2 1W1 1W2
    """
    placement, num_ranks = schedule.placement, len(schedule.ranks)
    order = [
        deque(Action(action.stage, "F" if action.kind == "F" else "I", action.micro_batch) for action in row)
        for row in ([action for action in actions if action.kind != "W"] for actions in schedule.ranks)
    ]
    weights: list[deque[Action]] = [deque() for _ in range(num_ranks)]
    rows: list[list[Action]] = [[] for _ in range(num_ranks)]
    in_flight = [0] * num_ranks
    free_s = [0.0] * num_ranks
    never = float("inf")
    arrival_s = {Action(0, "F", micro_batch): 0.0 for micro_batch in range(schedule.num_micro_batches)}
    events = [(0.0, rank) for rank in range(num_ranks)]
    while events:
        now_s, rank = heapq.heappop(events)
        if free_s[rank] > now_s:
            continue
        following = order[rank][0] if order[rank] else None
        coming_s = arrival_s.get(following, never) if following else never
        if following and following.kind == "F" and in_flight[rank] >= max_in_flight:
            coming_s = never
        first = weights[rank][0] if weights[rank] else None
        if first and len(weights[rank]) > hold_back[rank]:
            action = weights[rank].popleft()
        elif following and coming_s <= now_s:
            action = order[rank].popleft()
        elif first and coming_s - now_s >= patience * costs.of(first):
            action = weights[rank].popleft()
        else:
            if coming_s < never:
                heapq.heappush(events, (coming_s, rank))
            continue
        rows[rank].append(action)
        free_s[rank] = end_s = now_s + costs.of(action)
        heapq.heappush(events, (end_s, rank))
        stage, micro_batch = action.stage, action.micro_batch
        in_flight[rank] += action.activation_change
        if action.kind == "I":
            weights[rank].append(Action(stage, "W", micro_batch))
        target = None
        if action.kind == "F":
            is_last = stage == len(placement) - 1
            target = Action(stage, "I", micro_batch) if is_last else Action(stage + 1, "F", micro_batch)
        elif action.kind == "I" and stage > 0:
            target = Action(stage - 1, "I", micro_batch)
        if target:
            crosses = placement[target.stage] != rank
            arrival_s[target] = end_s + (costs.transfer_s if crosses else 0.0)
            heapq.heappush(events, (arrival_s[target], placement[target.stage]))
    if any(order) or any(weights):
        return None
    return Schedule(name, schedule.num_micro_batches, tuple(map(tuple, rows)))
