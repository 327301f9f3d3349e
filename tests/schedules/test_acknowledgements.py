"""Acknowledgements, against every rank's row gone through message by message."""

from __future__ import annotations

import random

from hypothesis import given, settings
from hypothesis import strategies as st

from pipekit.schedules import Action, Schedule, plan_1f1b, plan_forward_only, plan_placement, validate
from pipekit.schedules.acknowledgements import plan_acknowledgements
from schedules.tables import needed, rank_of, schedules


def draw_table(placement: tuple[int, ...], num_micro_batches: int, *, seed: int) -> Schedule:
    """Return a table of which nothing is known but that it can be run: a random order, with random backwards split."""
    draw = random.Random(seed)
    last = len(placement) - 1
    left: list[Action] = []
    for stage in range(len(placement)):
        for micro_batch in range(num_micro_batches):
            kinds = draw.choice(["FB", "FIW"])
            left += [Action(stage, kind, micro_batch) for kind in kinds]  # type: ignore[arg-type]
    rows: list[list[Action]] = [[] for _ in range(max(placement) + 1)]
    done: set[tuple[int, str, int]] = set()
    while left:
        ready = [action for action in left if can_be_done(action, last, done)]
        action = draw.choice(ready)
        left.remove(action)
        done.add((action.stage, action.kind, action.micro_batch))
        rows[placement[action.stage]].append(action)
    return Schedule("random", num_micro_batches, tuple(map(tuple, rows)))


def can_be_done(action: Action, last: int, done: set[tuple[int, str, int]]) -> bool:
    return all(
        any((stage, kind, action.micro_batch) in done for kind in kinds) for stage, kinds in needed(action, last)
    )


random_tables = st.builds(
    draw_table,
    st.builds(
        plan_placement,
        st.sampled_from(["looped", "v"]),
        pp=st.integers(2, 3),
        stages_per_rank=st.integers(1, 2),
    ),
    st.integers(1, 5),
    seed=st.integers(0, 10**6),
)


def user_of(action: Action, row: tuple[Action, ...]) -> int:
    """Return the position in a row of the action that takes an action's result."""
    stage, kinds = (action.stage + 1, "F") if action.kind == "F" else (action.stage - 1, "BI")
    (position,) = (
        place
        for place, other in enumerate(row)
        if other.stage == stage and other.kind in kinds and other.micro_batch == action.micro_batch
    )
    return position


def sent(schedule: Schedule, source: int, target: int) -> list[Action]:
    """Return the actions of one rank whose results go to another."""
    ranks = rank_of(schedule)
    found = []
    for action in schedule.ranks[source]:
        if action.kind != "W" and source != target:
            stage = action.stage + (1 if action.kind == "F" else -1)
            found += [action] if ranks.get(stage) == target else []
    return found


def check(schedule: Schedule) -> None:
    """Compare with the definition: an answer proves what it and what stands before it in the answering row use.

    And nothing is confirmed that was not sent before the answer is used.
    """
    every_rank = range(len(schedule.ranks))
    for rank in every_rank:
        found = plan_acknowledgements(schedule, rank)
        assert set(found) == {peer for peer in every_rank if sent(schedule, rank, peer)}
        for peer, acknowledgements in found.items():
            row, own_row = schedule.ranks[peer], schedule.ranks[rank]
            messages = sent(schedule, rank, peer)
            assert sorted(acknowledgements.used) == sorted(messages)
            assert set(acknowledgements.confirmed) == set(sent(schedule, peer, rank))
            for answer, count in acknowledgements.confirmed.items():
                confirmed = {action for action in messages if user_of(action, row) <= row.index(answer)}
                assert set(acknowledgements.used[:count]) == confirmed
                assert all(own_row.index(action) < user_of(answer, own_row) for action in confirmed)


@settings(max_examples=15)
@given(schedules)
def test_answers_prove_what_stands_before_them_in_the_tables_of_the_generators(schedule: Schedule) -> None:
    check(schedule)


@given(random_tables)
def test_answers_prove_what_stands_before_them_in_any_table(schedule: Schedule) -> None:
    validate(schedule)
    check(schedule)


def test_a_gradient_proves_its_activation() -> None:
    acknowledgements = plan_acknowledgements(plan_1f1b(num_stages=2, num_micro_batches=4), 0)[1]
    for answer, count in acknowledgements.confirmed.items():
        assert acknowledgements.used[count - 1] == Action(0, "F", answer.micro_batch)


def test_a_table_of_forwards_proves_nothing_without_answers() -> None:
    looped = plan_forward_only(num_stages=2, num_micro_batches=4)
    assert [len(plan_acknowledgements(looped, rank)) for rank in (0, 1)] == [1, 0]
    assert plan_acknowledgements(looped, 0)[1].confirmed == {}
    # Where the last stage lives with the first, its inputs prove what they were made of.
    v = plan_forward_only(num_stages=4, num_micro_batches=4, placement=(0, 1, 1, 0))
    assert max(plan_acknowledgements(v, 0)[1].confirmed.values()) == 4
