"""The model of NCCL's channels: against devices that are played by hand, on channels that hang, and on our own."""

from __future__ import annotations

import random
import sys
from collections import defaultdict
from collections.abc import Hashable
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipekit.errors import ScheduleError
from pipekit.schedules import (
    SCHEDULE_NAMES,
    Costs,
    Schedule,
    plan_1f1b,
    plan_auto,
    plan_forward_only,
    plan_placement,
    plan_schedule,
    read_csv,
    validate,
    write_csv,
)
from pipekit.schedules.nccl import Communicator, edge, find_hang
from pipekit.schedules.operations import Operation, plan_operations
from pipekit.schedules.validate import check_operations
from schedules.tables import Rows, post_ahead, schedules


def by_direction(source: int, target: int) -> Hashable:
    """One communicator of the whole pipeline for each direction."""
    return "upward" if source < target else "downward"


def play(ranks: Rows, communicator: Communicator, *, syncs: bool, connected: bool) -> bool:
    """Play hosts and devices until nothing moves, and return whether all operations have ended."""
    issued = [0] * len(ranks)
    computing: list[list[Operation]] = [[] for _ in ranks]
    num_computed, num_to_compute = [0] * len(ranks), [0] * len(ranks)
    # For each rank and communicator its messages that have not ended, each with what must be computed before.
    streams: dict[tuple[int, Hashable], list[tuple[Operation, int]]] = defaultdict(list)
    used: set[tuple[int, Hashable]] = set()
    members: dict[Hashable, set[int]] = defaultdict(set)
    received: set[tuple[int, object]] = set()

    def stream_of(rank: int, operation: Operation) -> Hashable:
        assert operation.peer is not None
        ends = (rank, operation.peer) if operation.kind == "send" else (operation.peer, rank)
        return communicator(*ends)

    for rank, row in enumerate(ranks):
        for operation in row:
            if operation.kind in ("post", "send"):
                members[stream_of(rank, operation)].add(rank)

    def issue(rank: int) -> bool:
        if issued[rank] == len(ranks[rank]):
            return False
        busy = bool(computing[rank]) or any(queue for (owner, _), queue in streams.items() if owner == rank)
        if syncs and busy:
            return False
        if issued[rank] and not connected:
            before = ranks[rank][issued[rank] - 1]
            if before.peer is not None and before.kind != "receive":
                stream = stream_of(rank, before)
                if any((member, stream) not in used for member in members[stream]):
                    return False
        operation = ranks[rank][issued[rank]]
        issued[rank] += 1
        if operation.kind in ("run", "receive"):
            computing[rank].append(operation)
            num_to_compute[rank] += 1
        else:
            stream = stream_of(rank, operation)
            used.add((rank, stream))
            streams[rank, stream].append((operation, num_to_compute[rank]))
        return True

    def compute(rank: int) -> bool:
        if not computing[rank]:
            return False
        operation = computing[rank][0]
        if operation.kind == "receive" and (rank, operation.action) not in received:
            return False
        computing[rank].pop(0)
        num_computed[rank] += 1
        return True

    def deliver(rank: int, stream: Hashable) -> bool:
        queue = streams[rank, stream]
        if not queue or queue[0][0].kind != "send" or queue[0][1] > num_computed[rank]:
            return False
        send = queue[0][0]
        assert send.peer is not None
        other = streams[send.peer, stream]
        if not other or other[0][0].action != send.action or other[0][1] > num_computed[send.peer]:
            return False
        received.add((send.peer, send.action))
        queue.pop(0)
        other.pop(0)
        return True

    moved = True
    while moved:
        moved = sum(issue(rank) or compute(rank) for rank in range(len(ranks))) > 0
        moved |= sum(deliver(rank, stream) for rank, stream in list(streams)) > 0
    return issued == [len(row) for row in ranks] and not any(computing) and not any(streams.values())


@given(schedules, st.integers(0, 3), st.sampled_from([edge, by_direction]), st.booleans(), st.booleans())
@settings(max_examples=300)
def test_a_hang_is_found_exactly_where_devices_that_are_played_hang(
    schedule: Schedule, ahead: int, communicator: Communicator, syncs: bool, connected: bool
) -> None:
    rows = post_ahead(schedule, ahead)
    cycle = find_hang(rows, communicator=communicator, syncs=syncs, connected=connected)
    assert (cycle == []) == play(rows, communicator, syncs=syncs, connected=connected)


@given(schedules, st.booleans(), st.booleans())
@settings(max_examples=100)
def test_our_operations_end_where_devices_are_played(schedule: Schedule, syncs: bool, connected: bool) -> None:
    rows = [list(row) for row in plan_operations(schedule)]
    assert play(rows, edge, syncs=syncs, connected=connected)
    # A communicator of all ranks waits for all of them, so it is connected before.
    assert play(rows, by_direction, syncs=syncs, connected=True)


@pytest.mark.parametrize(("pp", "hangs"), [(2, False), (3, True), (4, True), (8, True)])
def test_1f1b_with_a_communicator_for_each_direction_hangs_from_three_stages_on(pp: int, hangs: bool) -> None:
    rows = post_ahead(plan_1f1b(num_stages=pp, num_micro_batches=2 * pp), 2)
    assert bool(find_hang(rows, communicator=by_direction, syncs=False)) == hangs
    # One for each edge is enough where no host waits for its device, and not where one does.
    assert not find_hang(rows, syncs=False)
    assert find_hang(rows)


def test_every_operation_of_a_cycle_waits_for_the_next() -> None:
    rows = post_ahead(plan_1f1b(num_stages=3, num_micro_batches=8), 2)
    cycle = find_hang(rows, communicator=by_direction, syncs=False)
    assert len(cycle) > 2
    for (rank, index), (other, at) in pairwise([*cycle, cycle[0]]):
        operation, awaited = rows[rank][index], rows[other][at]
        # An earlier operation of the rank, or the other end of its message.
        assert (rank == other and at < index) or (rank != other and operation.action == awaited.action)


def test_what_would_hang_is_refused_with_its_cycle_and_the_table() -> None:
    schedule = plan_1f1b(num_stages=2, num_micro_batches=3)
    with pytest.raises(ScheduleError) as caught:
        check_operations(schedule, post_ahead(schedule, 2))
    message, *grid = str(caught.value).split("\n")
    assert message.startswith(
        "schedule 1f1b: over NCCL these operations would wait for each other for ever, each for the next: rank "
    )
    assert len(grid) == 2
    assert ">0F0<" in grid[0]
    assert ">1B0<" in grid[1]


def test_a_receive_of_another_message_than_the_one_that_is_sent_is_refused() -> None:
    rows = [list(row) for row in plan_operations(plan_1f1b(num_stages=2, num_micro_batches=2))]
    rows[1][0], rows[1][1] = rows[1][1], rows[1][0]
    with pytest.raises(ValueError, match="rank 1 posts a receive of 0F1, and rank 0 sends 0F0"):
        find_hang(rows)


def prove(pp: int, num_micro_batches: int) -> None:
    """Prove the tables of every generator, and that of an evaluation."""
    for name in SCHEDULE_NAMES:
        if name != "interleaved-1f1b" or num_micro_batches % pp == 0:
            validate(plan_schedule(name, pp=pp, num_micro_batches=num_micro_batches), channels="nccl")
    placement = plan_placement("zb-v", pp=pp, stages_per_rank=2)
    forward = plan_forward_only(num_stages=2 * pp, num_micro_batches=num_micro_batches, placement=placement)
    check_operations(forward, plan_operations(forward))


@pytest.mark.parametrize("pp", [2, 3, 4, 5, 8])
def test_no_table_of_a_generator_can_hang(pp: int) -> None:
    for num_micro_batches in (1, pp - 1, pp, 2 * pp):
        prove(pp, num_micro_batches)


@pytest.mark.slow
@pytest.mark.parametrize("pp", range(2, 17))
def test_no_table_of_a_generator_can_hang_at_any_size(pp: int) -> None:
    border = {pp * rounds + offset for rounds in range(1, 5) for offset in (-1, 0, 1)}
    for num_micro_batches in range(1, 4 * pp + 1) if pp <= 8 else sorted({1, *border}):
        prove(pp, num_micro_batches)


def prove_auto(number: int) -> None:
    draw = random.Random(number)
    pp, num_micro_batches = draw.randint(2, 8), draw.randint(1, 24)
    placement = draw.choice([tuple(range(pp)), (*range(pp), *reversed(range(pp)))])
    seconds = [[draw.uniform(0.1, 4.0) for _ in placement] for _ in range(3)]
    costs = Costs(*seconds, transfer_s=draw.uniform(0.0, 1.0), overhead_s=draw.uniform(0.0, 0.2))
    validate(plan_auto(costs, placement=placement, num_micro_batches=num_micro_batches), channels="nccl")


@pytest.mark.parametrize("tens", [0, pytest.param(range(1, 30), marks=pytest.mark.slow)], ids=["ten", "the others"])
def test_no_table_that_is_planned_for_measured_costs_can_hang(tens: int | range) -> None:
    for ten in [tens] if isinstance(tens, int) else tens:
        for number in range(10):
            prove_auto(10 * ten + number)


def test_a_file_is_proved_as_it_is_read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "mine.csv"
    write_csv(plan_schedule("zb-v", pp=4, num_micro_batches=6), path)
    read_csv(path)
    monkeypatch.setattr(
        sys.modules["pipekit.schedules.validate"], "plan_operations", lambda table: post_ahead(table, 2)
    )
    with pytest.raises(ScheduleError, match="over NCCL these operations would wait for each other for ever"):
        read_csv(path)
