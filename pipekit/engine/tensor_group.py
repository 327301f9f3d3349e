"""Tensor-parallel peers over a process group, and the logical tensors of what they hold."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pipekit.deepspeed.optimizer_view import whole_shape
from pipekit.distributed.mpu import RankGroup
from pipekit.distributed.processes import wait
from pipekit.tensor_parallel.group import Pending, TensorGroup
from pipekit.tensor_parallel.shards import shard_of


class _Waiting:
    """A collective under way, and what makes its result of the buffers that it fills."""

    def __init__(
        self, group: ProcessTensorGroup, work: dist.Work | None, what: str, finish: Callable[[], Tensor]
    ) -> None:
        assert work is not None
        self._group = group
        self._work = work
        self._what = what
        self._finish = finish

    def wait(self) -> Tensor:
        started_s = time.perf_counter()
        wait(self._work, f"its tensor-parallel peers, with {self._what}")
        self._group.waited_s += time.perf_counter() - started_s
        return self._finish()


class ProcessTensorGroup(TensorGroup):
    """Tensor-parallel peers that talk through a process group.

    Args:
        group: the ranks.

    Attributes:
        waited_s: seconds that this process has waited for the others.
    """

    def __init__(self, group: RankGroup) -> None:
        self.rank, self.size = group.rank, group.size
        self.waited_s = 0.0
        self._ranks = group

    def start_all_reduce(self, tensor: Tensor) -> Pending:
        work = dist.all_reduce(tensor, group=self._ranks.process_group, async_op=True)
        return _Waiting(self, work, f"the sum of {_shape(tensor)}", lambda: tensor)

    def start_all_gather(self, tensor: Tensor, dim: int) -> Pending:
        own = tensor.contiguous()
        joined = own.new_empty((*own.shape[:dim], self.size * own.shape[dim], *own.shape[dim + 1 :]))
        parts = joined.view(self.size, -1)
        work = dist.all_gather_into_tensor(parts, own.view(1, -1), group=self._ranks.process_group, async_op=True)

        def finish() -> Tensor:
            return joined if _lies_in_parts(own, dim) else torch.cat([part.view_as(own) for part in parts], dim)

        return _Waiting(self, work, f"a gathering of {_shape(tensor)}", finish)

    def start_reduce_scatter(self, tensor: Tensor, dim: int) -> Pending:
        parts = tensor.contiguous() if _lies_in_parts(tensor, dim) else torch.stack(tensor.chunk(self.size, dim))
        own = tensor.new_empty((*tensor.shape[:dim], tensor.shape[dim] // self.size, *tensor.shape[dim + 1 :]))
        work = dist.reduce_scatter_tensor(
            own.view(1, -1), parts.view(self.size, -1), group=self._ranks.process_group, async_op=True
        )
        return _Waiting(self, work, f"the scattered sum of {_shape(tensor)}", lambda: own)


def _lies_in_parts(tensor: Tensor, dim: int) -> bool:
    """True if what is joined along `dim` lies one part after the other in memory, as it does in a batch of one."""
    return all(length == 1 for length in tensor.shape[:dim])


def logical_shape(parameter: nn.Parameter) -> tuple[int, ...]:
    """Return the shape of the logical tensor that a parameter is, or is a part of."""
    shard = shard_of(parameter)
    return whole_shape(parameter) if shard is None else shard.whole_shape(whole_shape(parameter))


def join_shards(own: Tensor, parameter: nn.Parameter, group: TensorGroup | None) -> Tensor:
    """Join what each tensor-parallel rank has of a parameter to the logical tensor. All of them call this together.

    Args:
        own: what belongs to this rank's part of the parameter: its weights, a state, a gradient.
        parameter: tells which part that is.
        group: the tensor-parallel peers.
    """
    shard = shard_of(parameter)
    if shard is None:
        return own
    assert group is not None, "a parameter that is cut belongs to a group"
    lengths = [shard.shape_of(rank, own.shape)[shard.dim] for rank in range(group.size)]
    # Ranks gather tensors of one shape; the parts of a vocabulary may differ by one row.
    padded = own.new_zeros((*own.shape[: shard.dim], max(lengths), *own.shape[shard.dim + 1 :]))
    padded.narrow(shard.dim, 0, own.shape[shard.dim]).copy_(own)
    parts = group.all_gather(padded.unsqueeze(0), 0)
    return shard.join([part.narrow(shard.dim, 0, length) for part, length in zip(parts, lengths, strict=True)])


def _shape(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"
