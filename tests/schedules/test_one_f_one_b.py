"""1F1B as a table, carried out by a brute-force simulation of stages that send and receive."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from pipekit.schedules import Action, Schedule, plan_1f1b, plan_forward_only

stages = st.integers(1, 9)
micro_batches = st.integers(1, 20)


def dry_run(schedule: Schedule) -> list[Action]:
    """Do every action as soon as what it needs has been done; fail if no rank can go on."""
    num_stages = len(schedule.ranks)
    positions = [0] * num_stages
    done: set[Action] = set()
    order: list[Action] = []
    while any(position < len(actions) for position, actions in zip(positions, schedule.ranks, strict=True)):
        moved = False
        for rank, actions in enumerate(schedule.ranks):
            if positions[rank] == len(actions):
                continue
            action = actions[positions[rank]]
            stage, micro_batch = action.stage, action.micro_batch
            needs = set()
            if action.kind == "F" and stage > 0:
                needs.add(Action(stage - 1, "F", micro_batch))
            if action.kind == "B":
                needs.add(Action(stage, "F", micro_batch))
                if stage < num_stages - 1:
                    needs.add(Action(stage + 1, "B", micro_batch))
            if needs <= done:
                done.add(action)
                order.append(action)
                positions[rank] += 1
                moved = True
        assert moved, f"deadlock after {order}"
    return order


def test_the_timetable_of_four_stages() -> None:
    assert str(plan_1f1b(num_stages=4, num_micro_batches=5)).splitlines() == [
        "0F0 0F1 0F2 0F3 0B0 0F4 0B1 0B2 0B3 0B4",
        "1F0 1F1 1F2 1B0 1F3 1B1 1F4 1B2 1B3 1B4",
        "2F0 2F1 2B0 2F2 2B1 2F3 2B2 2F4 2B3 2B4",
        "3F0 3B0 3F1 3B1 3F2 3B2 3F3 3B3 3F4 3B4",
    ]


@given(stages, micro_batches)
def test_every_micro_batch_passes_every_stage_once_each_way(num_stages: int, num_micro_batches: int) -> None:
    schedule = plan_1f1b(num_stages=num_stages, num_micro_batches=num_micro_batches)
    for stage, actions in enumerate(schedule.ranks):
        expected = Counter(Action(stage, kind, m) for kind in ("F", "B") for m in range(num_micro_batches))
        assert Counter(actions) == expected
    dry_run(schedule)


@given(stages, micro_batches)
def test_in_flight_activations_are_bounded_by_the_stages_behind(num_stages: int, num_micro_batches: int) -> None:
    schedule = plan_1f1b(num_stages=num_stages, num_micro_batches=num_micro_batches)
    for stage in range(num_stages):
        assert schedule.peak_in_flight(stage) == min(num_stages - stage, num_micro_batches)


@given(stages, micro_batches)
def test_forward_only_forwards_in_turn(num_stages: int, num_micro_batches: int) -> None:
    schedule = plan_forward_only(num_stages=num_stages, num_micro_batches=num_micro_batches)
    for stage, actions in enumerate(schedule.ranks):
        assert list(actions) == [Action(stage, "F", m) for m in range(num_micro_batches)]
    dry_run(schedule)
