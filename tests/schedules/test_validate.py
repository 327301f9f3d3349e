"""A table that cannot be run is refused, whatever is wrong with it, and the fault is shown at its cell."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipekit.errors import ScheduleError
from pipekit.schedules import Action, Schedule, plan_1f1b, plan_gpipe, plan_zb_h1, plan_zb_v, validate
from pipekit.schedules.dependencies import needs
from schedules.tables import longest_path_s, schedules

Rows = list[list[Action]]


def with_rows(schedule: Schedule, rows: Rows) -> Schedule:
    return replace(schedule, ranks=tuple(map(tuple, rows)))


def table(text: str, num_micro_batches: int) -> Schedule:
    rows = tuple(tuple(map(Action.parse, line.split())) for line in text.split("/"))
    return Schedule("mine", num_micro_batches, rows)


def break_at_random(schedule: Schedule, source: random.Random) -> Schedule | None:
    """Return a table that cannot be right any more; None where this way of breaking does not apply."""
    rows: Rows = [list(actions) for actions in schedule.ranks]
    rank = source.randrange(len(rows))
    position = source.randrange(len(rows[rank]))
    action = rows[rank][position]
    way = source.choice(["drop", "double", "renumber", "other kind", "other rank", "too early"])
    if way == "drop":
        del rows[rank][position]
    elif way == "double":
        rows[rank].insert(source.randrange(len(rows[rank]) + 1), action)
    elif way == "renumber":
        rows[rank][position] = replace(action, micro_batch=action.micro_batch + schedule.num_micro_batches)
    elif way == "other kind":
        rows[rank][position] = replace(action, kind=source.choice(sorted(set("FBIW") - {action.kind})))
    elif way == "other rank":
        if len(rows) == 1:
            return None
        if len({other.stage for other in rows[rank]}) == 1 and len(rows[rank]) == 1:
            return None
        del rows[rank][position]
        other = source.choice([index for index in range(len(rows)) if index != rank])
        rows[other].insert(source.randrange(len(rows[other]) + 1), action)
    else:
        # An action moves before one on its own rank that it needs.
        mine = {other: index for index, other in enumerate(rows[rank])}
        needed = [mine[other] for other in needs(action, schedule) if other in mine]
        if not needed:
            return None
        del rows[rank][position]
        rows[rank].insert(source.randrange(min(needed) + 1), action)
    return with_rows(schedule, rows)


@given(schedules, st.integers(0, 2**32))
@settings(max_examples=400)
def test_a_table_broken_at_random_is_refused(schedule: Schedule, seed: int) -> None:
    broken = break_at_random(schedule, random.Random(seed))
    if broken is not None:
        with pytest.raises(ScheduleError):
            validate(broken)


def shuffle(schedule: Schedule, source: random.Random) -> Schedule:
    """Return the table with a few actions of a rank exchanged for near ones."""
    rows: Rows = [list(actions) for actions in schedule.ranks]
    for _ in range(source.randrange(1, 4)):
        row = source.choice(rows)
        first = source.randrange(len(row))
        second = min(len(row) - 1, first + source.randrange(1, 4))
        row[first], row[second] = row[second], row[first]
    return with_rows(schedule, rows)


@given(schedules, st.integers(0, 2**32))
@settings(max_examples=200)
def test_shuffled_rows_are_accepted_exactly_if_brute_force_gets_through(schedule: Schedule, seed: int) -> None:
    shuffled = shuffle(schedule, random.Random(seed))
    gets_through = longest_path_s(shuffled, dict.fromkeys("FBIW", 1.0), 0.0) is not None
    try:
        validate(shuffled)
    except ScheduleError:
        assert not gets_through
    else:
        assert gets_through


FAULTS = {
    ("0F0 0F0 0B0", 1): "rank 0, position 1: 0F0 is done twice",
    ("0F0 0B0 0F1", 2): "1 passes stage 0 (rank 0) once with F, and then with either B, or I and W; it has F",
    ("0F0 0B0 0F99999999 0B99999999", 100000000): "micro-batch 1 passes stage 0 (rank 0) once with F",
    ("0F0 0B0/99999999F0 99999999B0", 1): "there is no stage 1",
    ("0F0 0I0", 1): "it has F, I",
    ("0F0 0B0 0W0", 1): "it has B, F, W",
    ("0B0 0F0", 1): "rank 0, position 0: 0B0 needs 0F0, which the rank does later",
    ("0F0 0W0 0I0", 1): "rank 0, position 1: 0W0 needs 0I0, which the rank does later",
    ("0F1 0B1", 1): "a step has the micro-batches 0 to 0",
    ("0F0 1F0 1B0 0B0/1F1 1B1", 2): "stage 1 lives on rank 0, and a stage lives on one rank",
    ("0F0 0B0/2F0 2B0", 1): "there is no stage 1",
    ("0F0 0B0/", 1): "rank 1 has no action",
}  # fmt: skip


@pytest.mark.parametrize(("text", "num_micro_batches"), FAULTS)
def test_a_fault_is_named(text: str, num_micro_batches: int) -> None:
    with pytest.raises(ScheduleError) as caught:
        validate(table(text, num_micro_batches))
    assert FAULTS[text, num_micro_batches] in str(caught.value)


def test_a_fault_is_shown_at_its_cell() -> None:
    with pytest.raises(ScheduleError) as caught:
        validate(table("0F0 0F1 0B0 0B1/1F0 1B0 1B1 1F1", 2))
    assert str(caught.value) == (
        "schedule mine: rank 1, position 2: 1B1 needs 1F1, which the rank does later\n"
        "rank 0:   0F0    0F1    0B0    0B1\n"
        "rank 1:   1F0    1B0   >1B1<   1F1"
    )


def test_only_the_part_around_a_fault_is_shown() -> None:
    schedule = plan_1f1b(num_stages=40, num_micro_batches=100)
    rows: Rows = [list(actions) for actions in schedule.ranks]
    rows[20][60], rows[20][61] = rows[20][61], rows[20][60]
    rows[20][70] = Action(20, "F", 0)
    with pytest.raises(ScheduleError) as caught:
        validate(with_rows(schedule, rows))
    lines = str(caught.value).split("\n")[1:]
    assert len(lines) == 17
    assert all(len(line) < 140 for line in lines)
    assert ">20F0<" in lines[8]


def test_ranks_that_wait_for_each_other_are_named() -> None:
    # Each does first what needs the other's second.
    crossed = table("0F1 0F0 0B0 0B1/1F0 1B0 1F1 1B1", 2)
    validate(crossed)
    deadlock = table("0F0 0B0 0F1 0B1/1F0 1F1 1B0 1B1", 2)
    with pytest.raises(ScheduleError) as caught:
        validate(deadlock)
    text = str(caught.value)
    assert "rank 0 waits before 0B0 for 1B0 of rank 1; rank 1 waits before 1F1 for 0F1 of rank 0" in text
    assert ">0B0<" in text


def test_blocking_sends_stop_1f1b_and_not_gpipe() -> None:
    validate(plan_gpipe(num_stages=4, num_micro_batches=8), channels="blocking")
    schedule = plan_1f1b(num_stages=2, num_micro_batches=3)
    validate(schedule)
    with pytest.raises(ScheduleError, match="rank 0 waits for rank 1 to receive the result of 0F1; rank 1 waits for"):
        validate(schedule, channels="blocking")


@given(schedules, st.integers(0, 2**32), st.booleans())
@settings(max_examples=200)
def test_blocking_is_accepted_exactly_if_brute_force_gets_through(
    schedule: Schedule, seed: int, shuffles: bool
) -> None:
    if shuffles:
        schedule = shuffle(schedule, random.Random(seed))
        # Where not even buffered sends get through, the two may differ in what they find first.
        if longest_path_s(schedule, dict.fromkeys("FBIW", 1.0), 0.0) is None:
            with pytest.raises(ScheduleError):
                validate(schedule, channels="blocking")
            return
    try:
        validate(schedule, channels="blocking")
        accepted = True
    except ScheduleError:
        accepted = False
    assert accepted == gets_through_blocking(schedule)


def gets_through_blocking(schedule: Schedule) -> bool:
    """Carry the table out as ranks that hand every result over in person, action by action."""
    ranks = {action.stage: rank for rank, actions in enumerate(schedule.ranks) for action in actions}
    last = max(ranks)
    scripts: list[list[tuple[str, str, int]]] = []
    for rank, actions in enumerate(schedule.ranks):
        script = []
        for action in actions:
            source = {"F": action.stage - 1, "B": action.stage + 1, "I": action.stage + 1}.get(action.kind, -1)
            if 0 <= source <= last and ranks[source] != rank:
                way = "up" if action.kind == "F" else "down"
                script.append(("take", f"{way} {action.stage} {action.micro_batch}", ranks[source]))
            target = {"F": action.stage + 1, "B": action.stage - 1, "I": action.stage - 1}.get(action.kind, -1)
            if 0 <= target <= last and ranks[target] != rank:
                way = "up" if action.kind == "F" else "down"
                script.append(("give", f"{way} {target} {action.micro_batch}", ranks[target]))
        scripts.append(script)
    moved = True
    while moved:
        moved = False
        for rank, script in enumerate(scripts):
            if script and script[0][0] == "give":
                _, what, peer = script[0]
                if scripts[peer] and scripts[peer][0] == ("take", what, rank):
                    del script[0], scripts[peer][0]
                    moved = True
    return not any(scripts)


def test_several_stages_on_a_rank_are_accepted() -> None:
    validate(plan_zb_v(pp=3, num_micro_batches=5))
    validate(plan_zb_h1(num_stages=1, num_micro_batches=3))
