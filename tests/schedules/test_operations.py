"""Operations of the ranks: everything once, in an order that a single worker could follow."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipekit.schedules import Schedule, plan_1f1b, plan_schedule
from pipekit.schedules.dependencies import needs
from pipekit.schedules.messages import plan_messages
from pipekit.schedules.operations import most_posted, plan_operations
from schedules.tables import schedules


@given(schedules, st.integers(0, 3))
@settings(max_examples=200)
def test_every_action_runs_and_every_message_is_posted_sent_and_received_once(schedule: Schedule, ahead: int) -> None:
    messages = plan_messages(schedule)
    for rank, operations in enumerate(plan_operations(schedule, ahead=ahead)):
        assert tuple(each.action for each in operations if each.kind == "run") == schedule.ranks[rank]
        for peer in range(len(schedule.ranks)):
            of_peer = [each for each in operations if each.peer == peer]
            sent = tuple(each.action for each in of_peer if each.kind == "send")
            posted = tuple(each.action for each in of_peer if each.kind == "post")
            received = [each.action for each in of_peer if each.kind == "receive"]
            assert sent == messages.get((rank, peer), ())
            # The order of the sender: a channel keeps it.
            assert posted == messages.get((peer, rank), ())
            assert sorted(received) == sorted(posted)


@given(schedules, st.integers(0, 3))
@settings(max_examples=200)
def test_what_an_action_needs_is_there_when_it_runs(schedule: Schedule, ahead: int) -> None:
    for rank, operations in enumerate(plan_operations(schedule, ahead=ahead)):
        seen: set[tuple[str, object]] = set()
        for operation in operations:
            if operation.kind == "run":
                for other in needs(operation.action, schedule):
                    is_here = schedule.placement[other.stage] == rank
                    assert ("run" if is_here else "receive", other) in seen
            if operation.kind == "receive":
                assert ("post", operation.action) in seen
            if operation.kind == "send":
                assert ("run", operation.action) in seen
            seen.add((operation.kind, operation.action))


@given(schedules)
@settings(max_examples=200)
def test_one_worker_could_do_all_of_them_each_message_at_both_ends_at_once(schedule: Schedule) -> None:
    rows = [[each for each in row if each.kind != "receive"] for row in plan_operations(schedule)]
    moved = True
    while moved:
        moved = False
        for row in rows:
            while row and row[0].kind == "run":
                row.pop(0)
                moved = True
            if row and row[0].kind == "send":
                peer = row[0].peer
                assert peer is not None
                if rows[peer] and rows[peer][0].kind == "post" and rows[peer][0].action == row[0].action:
                    row.pop(0)
                    rows[peer].pop(0)
                    moved = True
    assert not any(rows)


@pytest.mark.parametrize("name", ["gpipe", "1f1b", "zb-h1", "zb-v", "auto"])
def test_few_receives_are_posted_ahead(name: str) -> None:
    schedule = plan_schedule(name, pp=4, num_micro_batches=16)
    assert max(map(most_posted, plan_operations(schedule))) <= 4


@given(schedules, st.integers(1, 3))
@settings(max_examples=200)
def test_so_many_receives_of_each_peer_are_posted_as_soon_as_may_be(schedule: Schedule, ahead: int) -> None:
    messages = plan_messages(schedule)
    for rank, operations in enumerate(plan_operations(schedule, ahead=ahead)):
        left = {source: len(sent) for (source, target), sent in messages.items() if target == rank}
        posted: Counter[int | None] = Counter()
        for operation, following in pairwise([*operations, None]):
            assert operation is not None
            posted[operation.peer] += {"post": 1, "receive": -1}.get(operation.kind, 0)
            left[operation.peer] = left.get(operation.peer, 0) - (operation.kind == "post")
            if following is not None and following.kind != "post":
                assert all(posted[peer] >= min(ahead, number + posted[peer]) for peer, number in left.items())


def test_receives_are_posted_before_they_are_needed() -> None:
    operations = plan_operations(plan_1f1b(num_stages=4, num_micro_batches=16))[1]
    # In the steady state of 1F1B something is computed between the posts of gradients and their receives.
    kinds = [each.kind for each in operations]
    ahead = [at for at, kind in enumerate(kinds) if kind == "post" and kinds[at + 1] != "receive"]
    assert len(ahead) > 10
