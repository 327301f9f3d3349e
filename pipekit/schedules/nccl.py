"""Model of NCCL's channels: a graph of operations that wait for each other, whose cycles are hangs."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Hashable, Mapping, Sequence
from itertools import pairwise

from pipekit.schedules.operations import Operation

Communicator = Callable[[int, int], Hashable]
"""Returns the communicator that carries the messages of one pipeline rank to another."""

Place = tuple[int, int]
"""An operation: its rank, and its index in the rank's list."""


def edge(source: int, target: int) -> Hashable:
    """A communicator of two ranks for each directed edge of the pipeline, as in pipekit's executor."""
    return source, target


def find_hang(
    ranks: Sequence[Sequence[Operation]],
    *,
    communicator: Communicator = edge,
    syncs: bool = True,
    connected: bool = True,
) -> list[Place]:
    """Find a deadlock: operations that wait for each other forever under the rules of NCCL and CUDA.

    On the host, a rank issues its operations in order. On the device, actions run in order on one stream, and the
    messages of each communicator on a separate stream. A message begins when the previous message on its stream and all
    actions that the host had issued before it have ended. It ends when both of its ends have begun. An action after a
    `receive` begins when the message has ended.

    This is a graph of events, and further waits can only add cycles to it. So a wait that may occur anywhere is
    modelled as one that occurs everywhere.

    Args:
        ranks: the operations of each rank.
        communicator: carries the messages from one rank to another.
        syncs: whether the host waits for its whole device after each operation.
        connected: whether communicators are connected before the first operation; otherwise the host waits for the
            other end in its first message on each.

    Returns:
        A cycle: each operation waits for the next, and the last for the first. Empty if all operations end.

    Raises:
        ValueError: if a receive is posted for another message than the one that is sent.

    Example:
        >>> from pipekit.schedules import plan_1f1b
        >>> from pipekit.schedules.operations import plan_operations
        >>> find_hang(plan_operations(plan_1f1b(num_stages=4, num_micro_batches=8)))
        []
    """
    return _Graph(ranks, communicator, syncs=syncs, connected=connected).find_cycle()


# Events of an operation. What a host issues, it has issued before the device begins it.
_ISSUED, _BEGUN, _ENDED, _DRAINED = range(4)


class _Graph:
    def __init__(
        self, ranks: Sequence[Sequence[Operation]], communicator: Communicator, *, syncs: bool, connected: bool
    ) -> None:
        self._starts = [0]
        for operations in ranks:
            self._starts.append(self._starts[-1] + len(operations))
        # For each event, those that it waits for.
        self._waits_for: list[list[int]] = [[] for _ in range(4 * self._starts[-1])]
        self._syncs = syncs
        posts: dict[tuple[int, int], list[Place]] = {}
        sends: dict[tuple[int, int], list[Place]] = {}
        # By communicator, the first operation of each rank.
        firsts: dict[Hashable, dict[int, int]] = {}
        for rank, operations in enumerate(ranks):
            self._add_rank(rank, operations, communicator)
            for index, operation in enumerate(operations):
                ends = operation.message_of(rank)
                if ends is not None:
                    (sends if operation.kind == "send" else posts).setdefault(ends, []).append((rank, index))
                    firsts.setdefault(communicator(*ends), {}).setdefault(rank, index)
        for pair in posts.keys() | sends.keys():
            self._add_messages(ranks, posts.get(pair, []), sends.get(pair, []))
        if not connected:
            for first in firsts.values():
                self._add_connection(ranks, first)

    def _event(self, place: Place, kind: int) -> int:
        return 4 * (self._starts[place[0]] + place[1]) + kind

    def _add(self, event: int, *others: int) -> None:
        self._waits_for[event] += others

    def _add_rank(self, rank: int, operations: Sequence[Operation], communicator: Communicator) -> None:
        computed: int | None = None
        last_of: dict[Hashable, int] = {}
        posted: dict[object, int] = {}
        for index, operation in enumerate(operations):
            issued, begun, ended, drained = (self._event((rank, index), kind) for kind in range(4))
            self._add(begun, issued)
            self._add(ended, begun)
            self._add(drained, ended)
            if index:
                before = (rank, index - 1)
                self._add(issued, self._event(before, _DRAINED if self._syncs else _ISSUED))
                self._add(drained, self._event(before, _DRAINED))
            if computed is not None:
                self._add(begun, computed)
            if operation.kind == "run":
                computed = ended
            elif operation.kind == "receive":
                self._add(ended, posted[operation.action])
                computed = ended
            elif (ends := operation.message_of(rank)) is not None:
                stream = communicator(*ends)
                if stream in last_of:
                    self._add(begun, last_of[stream])
                last_of[stream] = ended
                if operation.kind == "post":
                    posted[operation.action] = ended

    def _add_messages(
        self, ranks: Sequence[Sequence[Operation]], posts: Sequence[Place], sends: Sequence[Place]
    ) -> None:
        for post, send in zip(posts, sends, strict=True):
            wanted, sent = (ranks[rank][index].action for rank, index in (post, send))
            if wanted != sent:
                raise ValueError(f"rank {post[0]} posts a receive of {wanted}, and rank {send[0]} sends {sent}")
            self._add(self._event(post, _ENDED), self._event(send, _BEGUN))
            self._add(self._event(send, _ENDED), self._event(post, _BEGUN))

    def _add_connection(self, ranks: Sequence[Sequence[Operation]], first: Mapping[int, int]) -> None:
        for rank, index in first.items():
            if index + 1 < len(ranks[rank]):
                others = [self._event((other, at), _ISSUED) for other, at in first.items() if other != rank]
                self._add(self._event((rank, index + 1), _ISSUED), *others)

    def find_cycle(self) -> list[Place]:
        left = [len(others) for others in self._waits_for]
        followers: list[list[int]] = [[] for _ in left]
        for event, others in enumerate(self._waits_for):
            for other in others:
                followers[other].append(event)
        ready = [event for event, count in enumerate(left) if not count]
        while ready:
            for event in followers[ready.pop()]:
                left[event] -= 1
                if not left[event]:
                    ready.append(event)
        stuck = next((event for event, count in enumerate(left) if count), None)
        if stuck is None:
            return []
        # Every event that is left waits for another that is left: follow them until one comes again.
        path: dict[int, int] = {}
        while stuck not in path:
            path[stuck] = len(path)
            stuck = next(other for other in self._waits_for[stuck] if left[other])
        cycle = [event // 4 for event, position in path.items() if position >= path[stuck]]
        return [self._place(number) for number, following in pairwise([*cycle, cycle[0]]) if number != following]

    def _place(self, number: int) -> Place:
        rank = bisect_right(self._starts, number) - 1
        return rank, number - self._starts[rank]
