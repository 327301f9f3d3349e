"""The data-parallel reduction of gradients in place, layer by layer behind the last backward of each stage."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pipekit.deepspeed.gradient_buffers import GradientGroup
from pipekit.deepspeed.optimizer_view import OptimizerView
from pipekit.distributed.mpu import RankGroup
from pipekit.distributed.processes import wait
from pipekit.errors import PipekitError
from pipekit.predictions.timing import BUCKET_ELEMENTS, SHARE_ELEMENTS_PER_REPLICA

_COPIED_ELEMENTS = 1_000_000


@dataclass(frozen=True, eq=False)
class _Bucket:
    """A slice of a flat buffer, and the parameters whose gradients lie in it.

    Attributes:
        pieces: parts of the slice, each with the replica that alone needs its mean; None where all need it.
    """

    parameters: Sequence[nn.Parameter]
    pieces: Sequence[tuple[Tensor, int | None]]


class GradientReducer:
    """Averages gradients over the replicas of a stage, in place, while the backward of its lower layers still runs.

    Under ZeRO each gradient goes only to the replica that updates its weights, where that is faster.

    Args:
        view: where the gradients are.
        group: the replicas.
        shared: parameters whose gradients are to be summed over other ranks, too; all replicas get these.
    """

    def __init__(self, view: OptimizerView, group: RankGroup, *, shared: Collection[nn.Parameter] = ()) -> None:
        self._view = view
        self._group = group
        self._shared = set(shared)
        self._groups: dict[Tensor, GradientGroup] = {}
        if view.buffers is not None and group.size > 1:
            self._groups = {parameter: each for each in view.buffers.groups for parameter in each.starts}
        self._begun: list[tuple[dist.Work, Tensor, int | None]] = []

    @contextmanager
    def reducing(
        self, parameters: Sequence[nn.Parameter], expected: Iterable[Tensor] | None = None, *, whole: bool = False
    ) -> Iterator[None]:
        """Begin to reduce gradients as soon as they are complete in the last backward of a stage, which runs inside.

        All replicas do this with the same parameters, in the same order. Reductions begin from the last layer to the
        first, whatever the order in which gradients come.

        Args:
            parameters: those of the stage, in the order of its layers.
            expected: the parameters that get gradients inside, each as often as it does; by default every one once.
            whole: whether each replica needs the means of all gradients.

        Raises:
            PipekitError: if a parameter gets another gradient after its first one.
        """
        buffers = self._view.buffers
        if not self._groups or buffers is None:
            yield
            return
        waiting = deque(self._plan(parameters, whole=whole))
        missing = Counter(parameters if expected is None else expected)
        begun: set[Tensor] = set()

        def note(parameter: Tensor) -> None:
            missing[parameter] -= 1
            if parameter in begun:
                raise PipekitError(
                    f"a parameter of shape {tuple(parameter.shape)} got a second gradient in one backward, after the "
                    "reduction of its first over the replicas has begun; torch.utils.checkpoint does that with "
                    "use_reentrant=True: use use_reentrant=False"
                )
            while waiting and all(missing[each] <= 0 for each in waiting[0].parameters):
                begun.update(waiting[0].parameters)
                self._begin(waiting.popleft())

        buffers.on_added = note
        try:
            yield
        finally:
            buffers.on_added = None
        for bucket in waiting:
            self._begin(bucket)

    def finish(self) -> None:
        """Wait until everything begun is reduced, and divide the sums that this replica needs."""
        for work, piece, owner in self._begun:
            wait(work, "the gradients of the other replicas")
            if owner is None or owner == self._group.rank:
                piece.div_(self._group.size)
        self._begun = []

    def _begin(self, bucket: _Bucket) -> None:
        for parameter in bucket.parameters:
            self._view.gradient_or_zeros(parameter)
        group = self._group.process_group
        for piece, owner in bucket.pieces:
            if owner is None:
                work = dist.all_reduce(piece, group=group, async_op=True)
            else:
                work = dist.reduce(piece, group=group, group_dst=owner, async_op=True)
            assert work is not None
            self._begun.append((work, piece, owner))

    def _plan(self, parameters: Sequence[nn.Parameter], *, whole: bool) -> Iterator[_Bucket]:
        """Cut the gradients into buckets, in the order in which a backward computes them."""
        runs: dict[tuple[int, bool], list[nn.Parameter]] = {}
        for parameter in reversed(parameters):
            if parameter not in self._groups:
                # The optimizer does not update it.
                continue
            group = self._groups[parameter]
            least = self._group.size * SHARE_ELEMENTS_PER_REPLICA
            is_whole = whole or parameter in self._shared or group.shard is None or group.shard < least
            key = (id(group), is_whole)
            run = runs.setdefault(key, [])
            start = group.starts[parameter]
            if run and start + parameter.numel() != group.starts[run[-1]]:
                yield self._bucket(run, is_whole)
                run = runs[key] = []
            run.append(parameter)
            if group.starts[run[0]] + run[0].numel() - start >= BUCKET_ELEMENTS:
                yield self._bucket(runs.pop(key), is_whole)
        for (_, is_whole), run in runs.items():
            yield self._bucket(run, is_whole)

    def _bucket(self, run: Sequence[nn.Parameter], is_whole: bool) -> _Bucket:
        group = self._groups[run[0]]
        start, end = group.starts[run[-1]], group.starts[run[0]] + run[0].numel()
        if is_whole or group.shard is None:
            return _Bucket(run, [(group.flat[start:end], None)])
        owners = range(start // group.shard, (end - 1) // group.shard + 1)
        bounds = [start, *(owner * group.shard for owner in owners[1:]), end]
        return _Bucket(run, [(group.flat[bounds[i] : bounds[i + 1]], owner) for i, owner in enumerate(owners)])


def reduce_together(tensors: Iterable[Tensor], reduce: Callable[[Tensor], Tensor]) -> None:
    """Reduce tensors in place: large ones each by itself, and small ones in one message.

    Example:
        >>> pair = [torch.ones(2), torch.ones(1, 2)]
        >>> reduce_together(pair, lambda tensor: tensor.mul_(3))
        >>> pair
        [tensor([3., 3.]), tensor([[3., 3.]])]
    """
    small = []
    for tensor in tensors:
        if tensor.numel() >= _COPIED_ELEMENTS:
            reduce(tensor)
        else:
            small.append(tensor)
    if small:
        reduced = reduce(torch.cat([tensor.flatten() for tensor in small]))
        for tensor, piece in zip(small, torch.split(reduced, [tensor.numel() for tensor in small]), strict=True):
            tensor.copy_(piece.view_as(tensor))
