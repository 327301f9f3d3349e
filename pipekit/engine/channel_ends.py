"""Process groups of the channels between pipeline ranks."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise

import torch
import torch.distributed as dist

from pipekit.distributed.mpu import ModelParallelUnit, RankGroup
from pipekit.distributed.processes import wait
from pipekit.engine.channels import End

Pair = tuple[int, int]


class ChannelEnds:
    """The process groups through which a pipeline rank talks to its neighbours.

    NCCL does the messages of a group one after the other, in the order in which each rank posts them. So there, every
    directed edge of the pipeline has a group of its two ranks, which is connected here: a first message would connect
    it later, at another time on each. Gloo matches messages by sender and receiver, and each of its groups costs
    threads: there, the whole pipeline shares a group for each direction.

    Args:
        mpu: the process groups of the layout. Every rank of the world builds its ends at the same time.
        device: where the tensors are.

    Attributes:
        headers: the pipeline's ranks on CPUs; None where there is one.
    """

    def __init__(self, mpu: ModelParallelUnit, device: torch.device) -> None:
        self._mpu = mpu
        self.headers: RankGroup | None = None
        # By the pipeline ranks of the sender and the receiver.
        self._groups: dict[Pair, RankGroup] = {}
        if mpu.layout.pp == 1:
            return
        pipelines = mpu.layout.groups("pipe")
        self.headers = mpu.build_group(pipelines, "gloo", purpose="headers")
        neighbours = {(min(pair), max(pair)) for pair in pairwise(mpu.placement) if pair[0] != pair[1]}
        for purpose, is_upward in (("upward", True), ("downward", False)):
            if has_pairs():
                for pairs in disjoint(sorted(neighbours)):
                    self._build_pairs(pairs, purpose, is_upward, device)
            else:
                group = mpu.build_group(pipelines, purpose=purpose)
                assert group is not None
                self._groups.update({pair if is_upward else pair[::-1]: group for pair in neighbours})

    def _build_pairs(self, pairs: Iterable[Pair], purpose: str, is_upward: bool, device: torch.device) -> None:
        layout = self._mpu.layout
        ranks = {
            pair: [
                [layout.rank(pipe=pipe_rank, data=data, tensor=tensor) for pipe_rank in pair]
                for data in range(layout.dp)
                for tensor in range(layout.tp)
            ]
            for pair in pairs
        }
        group = self._mpu.build_group([own for of_pair in ranks.values() for own in of_pair], purpose=purpose)
        if group is None:
            return
        pair = next(pair for pair, of_pair in ranks.items() if group.ranks in of_pair)
        source, target = pair if is_upward else pair[::-1]
        self._groups[source, target] = group
        message = torch.zeros(1, device=device)
        is_source = self._mpu.pipe_rank == source
        end = self._end(group, target if is_source else source)
        work = end.send(message) if is_source else end.receive(message)
        wait(work, f"the channel of pipeline ranks {source} and {target}")

    def _end(self, group: RankGroup, peer: int) -> End:
        return End(group.process_group, group.ranks.index(self._mpu.pipe.ranks[peer]))

    def to(self, peer: int) -> tuple[End, End]:
        """The ends at a pipeline rank that this one sends to: of tensors, and of their descriptions."""
        assert self.headers is not None
        return self._end(self._groups[self._mpu.pipe_rank, peer], peer), self._end(self.headers, peer)

    def of(self, peer: int) -> tuple[End, End]:
        """The ends at a pipeline rank that this one receives from: of tensors, and of their descriptions."""
        assert self.headers is not None
        return self._end(self._groups[peer, self._mpu.pipe_rank], peer), self._end(self.headers, peer)


def has_pairs() -> bool:
    """True where every directed edge of a pipeline has a group of its own."""
    return str(dist.get_backend()) != "gloo"


def disjoint(pairs: Iterable[Pair]) -> list[list[Pair]]:
    """Distribute pairs among as few lists as a pipeline needs, so that no rank is twice in a list.

    Example:
        >>> disjoint([(0, 1), (1, 2), (2, 3), (0, 3)])
        [[(0, 1), (2, 3)], [(1, 2), (0, 3)]]
    """
    lists: list[list[Pair]] = []
    for pair in pairs:
        free = (found for found in lists if not any(set(pair) & set(other) for other in found))
        chosen = next(free, None)
        if chosen is None:
            lists.append([pair])
        else:
            chosen.append(pair)
    return lists
