"""List scheduling: a table from costs, by always starting the most urgent action that can start."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

from pipekit.schedules.action import Action, ActionKind
from pipekit.schedules.schedule import Schedule
from pipekit.schedules.simulate import Costs


@dataclass(frozen=True)
class Priorities:
    """Priorities among the actions that can start.

    Attributes:
        backward_first: whether input gradients run before forwards; otherwise they alternate.
        late_stage_first: whether a rank runs forwards on its later stages first; otherwise on its earlier ones.
        patience: time to wait for an action of another rank before starting a weight gradient, in weight gradients.
        eager_weights: number of weight gradients that may wait while forwards can run; if more wait, they run first.
    """

    backward_first: bool
    late_stage_first: bool
    patience: float
    eager_weights: int


def list_schedule(
    *,
    placement: Sequence[int],
    num_micro_batches: int,
    costs: Costs,
    max_in_flight: Sequence[int],
    priorities: Priorities,
    name: str,
) -> Schedule:
    """Return a table with split backwards, from a simulation of ranks that choose an action whenever they are free.

    On every stage each kind of action takes micro-batches in order, so gradients accumulate in the same order under
    every table. A rank may hold `max_in_flight` stage activations, which is at least its number of stages.
    """
    num_stages, num_ranks = len(placement), max(placement) + 1
    stages_of = [[stage for stage in range(num_stages) if placement[stage] == rank] for rank in range(num_ranks)]
    # The next micro-batch of each kind and stage, and when its input is there; infinite where nobody has begun it.
    never = float("inf")
    following = {kind: [0] * num_stages for kind in "FIW"}
    arrival = {kind: [[never] * num_micro_batches for _ in range(num_stages)] for kind in "FIW"}
    arrival["F"][0] = [0.0] * num_micro_batches
    rows: list[list[Action]] = [[] for _ in range(num_ranks)]
    free_s = [0.0] * num_ranks
    in_flight = [0] * num_ranks
    waiting_weights = [0] * num_ranks
    last_kind = ["I"] * num_ranks

    def arrival_of(kind: str, stage: int) -> float:
        micro_batch = following[kind][stage]
        return arrival[kind][stage][micro_batch] if micro_batch < num_micro_batches else never

    def may_forward(rank: int, stage: int) -> bool:
        # A later stage of the rank keeps room for one, or what the earlier ones hold could never get past it.
        later = len(stages_of[rank]) - 1 - stages_of[rank].index(stage)
        return in_flight[rank] < max_in_flight[rank] - later

    def choose(rank: int, now_s: float) -> tuple[str, int] | float | None:
        """Return the next action, or the time until which to wait, or None if only another rank's action can help."""
        stages = stages_of[rank]
        order = stages[::-1] if priorities.late_stage_first else stages
        forwards = [stage for stage in order if may_forward(rank, stage)]
        ready_f = [stage for stage in forwards if arrival_of("F", stage) <= now_s]
        ready_i = [stage for stage in reversed(stages) if arrival_of("I", stage) <= now_s]
        ready_w = [stage for stage in reversed(stages) if arrival_of("W", stage) <= now_s]
        if ready_w and waiting_weights[rank] > priorities.eager_weights:
            return "W", ready_w[0]
        if ready_i and (priorities.backward_first or not ready_f or last_kind[rank] == "F"):
            return "I", ready_i[0]
        if ready_f:
            return "F", ready_f[0]
        if ready_i:
            return "I", ready_i[0]
        coming = min(
            [arrival_of("I", stage) for stage in stages] + [arrival_of("F", stage) for stage in forwards], default=never
        )
        if ready_w and coming - now_s >= priorities.patience * costs.weight_gradient_s[ready_w[0]]:
            return "W", ready_w[0]
        return coming if coming < never else None

    events = [(0.0, rank) for rank in range(num_ranks)]
    while events:
        now_s, rank = heapq.heappop(events)
        if free_s[rank] > now_s:
            continue
        choice = choose(rank, now_s)
        if choice is None:
            continue
        if isinstance(choice, float):
            heapq.heappush(events, (choice, rank))
            continue
        kind, stage = choice
        micro_batch = following[kind][stage]
        following[kind][stage] += 1
        action = Action(stage, cast(ActionKind, kind), micro_batch)
        rows[rank].append(action)
        end_s = now_s + costs.of(action)
        free_s[rank] = end_s
        heapq.heappush(events, (end_s, rank))
        in_flight[rank] += action.activation_change
        waiting_weights[rank] += {"F": 0, "I": 1, "W": -1}[kind]
        if kind != "W":
            last_kind[rank] = kind
        targets = []
        if kind == "F":
            targets = [("F", stage + 1) if stage + 1 < num_stages else ("I", stage)]
        elif kind == "I":
            targets = [("W", stage)] + ([("I", stage - 1)] if stage > 0 else [])
        for target_kind, target in targets:
            crosses = placement[target] != rank
            arrival[target_kind][target][micro_batch] = end_s + (costs.transfer_s if crosses else 0.0)
            if crosses:
                heapq.heappush(events, (end_s + costs.transfer_s, placement[target]))
    assert all(following["W"][stage] == num_micro_batches for stage in range(num_stages)), "the limit left no way on"
    return Schedule(name, num_micro_batches, tuple(map(tuple, rows)))
