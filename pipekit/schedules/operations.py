"""Operations of a pipeline rank, in order: receives that it posts, actions that it runs, results that it sends."""

from __future__ import annotations

from collections import Counter, defaultdict, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal

from pipekit.schedules.action import Action
from pipekit.schedules.dependencies import dry_run, needs
from pipekit.schedules.messages import destination
from pipekit.schedules.schedule import Schedule

OperationKind = Literal["post", "receive", "run", "send"]

POSTED_AHEAD = 2
"""Number of receives that a rank posts ahead for each peer over gloo, so the next message arrives during a use."""


@dataclass(frozen=True)
class Operation:
    """One operation that a rank's host issues to its device.

    Attributes:
        kind: `post` asks for a message, `receive` waits for it, `run` computes, `send` sends the result.
        action: the action that runs, or whose result is the message.
        peer: pipeline rank of the other end of the message; None for `run`.
    """

    kind: OperationKind
    action: Action
    peer: int | None = None

    def __str__(self) -> str:
        return f"{self.kind} {self.action}"

    def message_of(self, rank: int) -> tuple[int, int] | None:
        """Sender and receiver of the message that `rank` sends or posts with this operation, or None."""
        if self.peer is None or self.kind == "receive":
            return None
        return (rank, self.peer) if self.kind == "send" else (self.peer, rank)


def plan_operations(schedule: Schedule, *, ahead: int = 0) -> tuple[tuple[Operation, ...], ...]:
    """Operations of every rank of a pipeline, in an order in which no rank can wait forever.

    All actions are put in one order in which they could run one at a time. A message is sent, and its receive posted,
    at its action's position in that order. So an operation only waits for earlier ones, even if every send waits for
    its receive, a channel carries one message at a time, and the host waits for its device after each operation (as
    CUDA does to load a kernel or to free memory). The order is that of a step with equal stages, so receives are posted
    early.

    Args:
        schedule: the table.
        ahead: number of receives that are posted for each peer as soon as an earlier one has ended, if that is sooner.
            Only for channels whose receives never delay anything else, as over gloo.

    Example:
        >>> from pipekit.schedules import plan_1f1b
        >>> for row in plan_operations(plan_1f1b(num_stages=2, num_micro_batches=2)):
        ...     print(", ".join(map(str, row)))
        run 0F0, send 0F0, run 0F1, send 0F1, post 1B0, receive 1B0, run 0B0, post 1B1, receive 1B1, run 0B1
        post 0F0, post 0F1, receive 0F0, run 1F0, run 1B0, send 1B0, receive 0F1, run 1F1, run 1B1, send 1B1
    """
    operations: list[list[Operation]] = [[] for _ in schedule.ranks]
    for rank, action in _global_order(schedule):
        for other in needs(action, schedule):
            source = schedule.placement[other.stage]
            if source != rank:
                operations[rank].append(Operation("receive", other, source))
        operations[rank].append(Operation("run", action))
        stage = destination(action, schedule)
        if stage is not None and (target := schedule.placement[stage]) != rank:
            operations[target].append(Operation("post", action, rank))
            operations[rank].append(Operation("send", action, target))
    return tuple(tuple(_post_ahead(row, ahead)) for row in operations)


def _post_ahead(operations: Sequence[Operation], ahead: int) -> Iterator[Operation]:
    """The operations of a rank, with up to `ahead` receives of each peer posted at any time."""
    waiting: defaultdict[int | None, deque[Operation]] = defaultdict(deque)
    for operation in operations:
        if operation.kind == "post":
            waiting[operation.peer].append(operation)
    posted: Counter[int | None] = Counter()

    def top_up(peer: int | None) -> Iterator[Operation]:
        while waiting[peer] and posted[peer] < ahead:
            posted[peer] += 1
            yield waiting[peer].popleft()

    for peer in list(waiting):
        yield from top_up(peer)
    for operation in operations:
        peer = operation.peer
        if operation.kind != "post":
            yield operation
        elif waiting[peer] and waiting[peer][0] == operation:
            posted[peer] += 1
            yield waiting[peer].popleft()
        if operation.kind == "receive":
            posted[peer] -= 1
            yield from top_up(peer)


def most_posted(operations: Sequence[Operation]) -> int:
    """Peak number of messages that a rank has posted and not yet received.

    Example:
        >>> from pipekit.schedules import plan_1f1b
        >>> [most_posted(row) for row in plan_operations(plan_1f1b(num_stages=4, num_micro_batches=8))]
        [1, 2, 2, 2]
    """
    changes = {"post": 1, "receive": -1}
    return max(accumulate((changes.get(operation.kind, 0) for operation in operations), initial=0))


def _global_order(schedule: Schedule) -> list[tuple[int, Action]]:
    """All actions with their ranks, by the start of each where a whole backward takes two seconds, and all else one."""
    ends: dict[Action, int] = {}
    starts: dict[Action, int] = {}
    free = [0] * len(schedule.ranks)
    order, _ = dry_run(schedule)
    for rank, action in order:
        starts[action] = max([free[rank], *(ends[other] for other in needs(action, schedule))])
        free[rank] = ends[action] = starts[action] + (2 if action.kind == "B" else 1)
    return sorted(order, key=lambda item: (starts[item[1]], item))
