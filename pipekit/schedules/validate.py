"""Validation of a schedule table: it trains every micro-batch on every stage, and no rank waits forever."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from pipekit.errors import ScheduleError
from pipekit.schedules.action import Action
from pipekit.schedules.dependencies import dry_run, needs
from pipekit.schedules.messages import plan_messages
from pipekit.schedules.nccl import find_hang
from pipekit.schedules.operations import Operation, plan_operations
from pipekit.schedules.schedule import Schedule

Channels = Literal["buffered", "blocking", "nccl"]

# Cells shown on each side of a faulty one, and ranks above and below its row.
_SHOWN_CELLS, _SHOWN_RANKS = 6, 8


def validate(schedule: Schedule, *, channels: Channels = "buffered") -> None:
    """Check that a schedule table trains every micro-batch on every stage, and comes to an end.

    Every stage must be on one rank. Every micro-batch must pass every stage once forward and once backward, whole or
    split into input and weight gradient, each after the actions it needs. No rank may wait forever.

    With `buffered` channels a send does not wait for its receiver, as in pipekit's executor. With `blocking` channels a
    rank sends after each action and waits until the receiver reaches the action that needs the message. With `nccl`,
    the executor's operations follow the rules of NCCL and CUDA (`pipekit.schedules.nccl`), and each host waits for its
    device after each operation.

    Raises:
        ScheduleError: if a rule is broken; it names the rule and shows the table with the faulty cell between `>` and
            `<`.

    Example:
        >>> from pipekit.schedules import plan_gpipe, plan_1f1b
        >>> validate(plan_1f1b(num_stages=4, num_micro_batches=8))
        >>> validate(plan_gpipe(num_stages=4, num_micro_batches=8), channels="blocking")
        >>> validate(plan_1f1b(num_stages=4, num_micro_batches=8), channels="nccl")
    """
    _check_cells(schedule)
    _check_stages(schedule)
    _check_complete(schedule)
    _check_order(schedule)
    done, stuck = dry_run(schedule)
    if stuck:
        _refuse_deadlock(schedule, {action for _, action in done}, stuck)
    if channels == "blocking":
        _check_blocking(schedule)
    if channels == "nccl":
        check_operations(schedule, plan_operations(schedule))


def check_operations(schedule: Schedule, ranks: Sequence[Sequence[Operation]]) -> None:
    """Check that the operations of all ranks come to an end over NCCL.

    Raises:
        ScheduleError: if operations wait for each other forever; it shows them and their actions in the table.
    """
    # Connecting adds waits alone: what ends with it ends without it.
    cycle = find_hang(ranks, connected=False)
    if not cycle:
        return
    chain = [f"rank {rank}: {ranks[rank][index]}" for rank, index in cycle]
    acting = {ranks[rank][index].action for rank, index in cycle}
    cells = [
        (rank, position)
        for rank, actions in enumerate(schedule.ranks)
        for position, action in enumerate(actions)
        if action in acting
    ]
    raise ScheduleError(
        f"schedule {schedule.name}: over NCCL these operations would wait for each other for ever, each for the next: "
        f"{'; '.join([*chain, chain[0]])}\n{show_grid(schedule, *cells)}"
    )


def _check_cells(schedule: Schedule) -> None:
    if not any(schedule.ranks):
        raise ScheduleError(f"schedule {schedule.name}: the table is empty")
    seen: dict[Action, tuple[int, int]] = {}
    for rank, actions in enumerate(schedule.ranks):
        for position, action in enumerate(actions):
            if not 0 <= action.micro_batch < schedule.num_micro_batches:
                rule = f"a step has the micro-batches 0 to {schedule.num_micro_batches - 1}"
                raise _fault(schedule, rule, rank, position)
            if action in seen:
                raise _fault(schedule, f"{action} is done twice, first on rank {seen[action][0]}", rank, position)
            seen[action] = rank, position


def _check_stages(schedule: Schedule) -> None:
    rank_of: dict[int, int] = {}
    for rank, actions in enumerate(schedule.ranks):
        if not actions:
            raise ScheduleError(f"schedule {schedule.name}: rank {rank} has no action; every rank needs a stage")
        for position, action in enumerate(actions):
            if rank_of.setdefault(action.stage, rank) != rank:
                rule = f"stage {action.stage} lives on rank {rank_of[action.stage]}, and a stage lives on one rank"
                raise _fault(schedule, rule, rank, position)
    # Lazily, since a typing error may name the stage 100000000.
    missing = next((stage for stage in range(max(rank_of)) if stage not in rank_of), None)
    if missing is not None:
        raise ScheduleError(
            f"schedule {schedule.name}: there is no stage {missing}; stages are numbered from 0 to {max(rank_of)} "
            f"without a gap\n{show_grid(schedule)}"
        )


def _check_complete(schedule: Schedule) -> None:
    rank_of = schedule.placement
    kinds: dict[tuple[int, int], str] = {}
    for actions in schedule.ranks:
        for action in actions:
            key = action.stage, action.micro_batch
            kinds[key] = kinds.get(key, "") + action.kind
    every = ((stage, micro) for stage in range(len(rank_of)) for micro in range(schedule.num_micro_batches))
    for stage, micro_batch in every:
        found = "".join(sorted(kinds.get((stage, micro_batch), "")))
        if found in ("BF", "FIW"):
            continue
        what = f"micro-batch {micro_batch} passes stage {stage} (rank {rank_of[stage]})"
        has = f"it has {', '.join(found)}" if found else "it has none of them"
        row = enumerate(schedule.ranks[rank_of[stage]])
        positions = [at for at, action in row if (action.stage, action.micro_batch) == (stage, micro_batch)]
        rule = f"{what} once with F, and then with either B, or I and W; {has}"
        raise _fault(schedule, rule, rank_of[stage], positions[-1] if positions else None)


def _check_order(schedule: Schedule) -> None:
    for rank, actions in enumerate(schedule.ranks):
        at = {action: position for position, action in enumerate(actions)}
        for position, action in enumerate(actions):
            for other in needs(action, schedule):
                if at.get(other, -1) > position:
                    raise _fault(schedule, f"{action} needs {other}, which the rank does later", rank, position)


def _check_blocking(schedule: Schedule) -> None:
    """Run through the table where a send and its receive wait for each other."""
    target_of = {action: target for (_, target), sent in plan_messages(schedule).items() for action in sent}
    # Each row as a list of messages: receive the inputs of an action, then send its result.
    rows: list[list[tuple[str, Action, int]]] = []
    for rank, actions in enumerate(schedule.ranks):
        row: list[tuple[str, Action, int]] = []
        for action in actions:
            for other in needs(action, schedule):
                if schedule.placement[other.stage] != rank:
                    row.append(("receive", other, schedule.placement[other.stage]))
            if action in target_of:
                row.append(("send", action, target_of[action]))
        rows.append(row)
    heads = [0] * len(rows)
    ready = list(range(len(rows)))
    while ready:
        rank = ready.pop()
        while heads[rank] < len(rows[rank]):
            _, action, peer = rows[rank][heads[rank]]
            if heads[peer] == len(rows[peer]) or rows[peer][heads[peer]][1:] != (action, rank):
                break
            heads[rank] += 1
            heads[peer] += 1
            ready.append(peer)
    stuck = {rank: rows[rank][head] for rank, head in enumerate(heads) if head < len(rows[rank])}
    if stuck:
        waits = [
            f"rank {rank} waits for rank {peer} to {'receive' if kind == 'send' else 'send'} the result of {action}"
            for rank, (kind, action, peer) in sorted(stuck.items())
        ]
        raise ScheduleError(
            f"schedule {schedule.name}: the ranks wait for each other for ever where every send waits for its "
            f"receiver: {'; '.join(waits[:4])}\n{show_grid(schedule)}"
        )


def _refuse_deadlock(schedule: Schedule, done: set[Action], stuck: dict[int, Action]) -> None:
    ranks = sorted(stuck)
    positions = [next(i for i, action in enumerate(schedule.ranks[rank]) if action not in done) for rank in ranks]
    waits = [
        f"rank {rank} waits before {schedule.ranks[rank][position]} for {stuck[rank]} of rank "
        f"{schedule.placement[stuck[rank].stage]}"
        for rank, position in zip(ranks[:4], positions, strict=False)
    ]
    rule = f"the ranks wait for each other for ever, though every send is buffered: {'; '.join(waits)}"
    raise _fault(schedule, rule, ranks[0], positions[0])


def _fault(schedule: Schedule, rule: str, rank: int, position: int | None) -> ScheduleError:
    where = f"rank {rank}" if position is None else f"rank {rank}, position {position}"
    cells = [] if position is None else [(rank, position)]
    return ScheduleError(f"schedule {schedule.name}: {where}: {rule}\n{show_grid(schedule, *cells)}")


def show_grid(schedule: Schedule, *faults: tuple[int, int]) -> str:
    """Return the table as text, or the part around faulty cells, which are marked by `>` and `<`.

    Example:
        >>> from pipekit.schedules import plan_1f1b
        >>> print(show_grid(plan_1f1b(num_stages=2, num_micro_batches=2), (1, 1)))
        rank 0:   0F0    0F1    0B0    0B1
        rank 1:   1F0   >1B0<   1F1    1B1
    """
    rows, positions = zip(*faults, strict=True) if faults else ((0,), (0,))
    ranks = range(max(0, min(rows) - _SHOWN_RANKS), min(len(schedule.ranks), max(rows) + _SHOWN_RANKS + 1))
    first = max(0, min(positions) - _SHOWN_CELLS)
    cells: list[Sequence[str]] = []
    for row in ranks:
        shown = schedule.ranks[row][first : max(positions) + _SHOWN_CELLS + 1]
        cells.append([f">{a}<" if (row, first + i) in faults else f" {a} " for i, a in enumerate(shown)])
    width = max((len(cell) for row in cells for cell in row), default=0)
    digits = len(str(ranks[-1]))
    lines = []
    for row, shown_cells in zip(ranks, cells, strict=True):
        before = "... " if first else ""
        after = " ..." if len(schedule.ranks[row]) > first + len(shown_cells) else ""
        joined = "  ".join(cell.ljust(width) for cell in shown_cells).rstrip()
        lines.append(f"rank {row:{digits}}: {before} {joined}{after}")
    return "\n".join(lines)
