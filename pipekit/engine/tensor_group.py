"""The tensor group of a rank, over its processes."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pipekit.deepspeed.optimizer_view import whole_shape
from pipekit.distributed.mpu import RankGroup
from pipekit.engine.channels import wait
from pipekit.tensor_parallel.group import Pending, TensorGroup
from pipekit.tensor_parallel.shards import shard_of


class _Waiting:
    """A collective under way, and what makes its result of the buffers that it fills."""

    def __init__(self, work: dist.Work | None, what: str, finish: Callable[[], Tensor]) -> None:
        assert work is not None
        self._work = work
        self._what = what
        self._finish = finish

    def wait(self) -> Tensor:
        wait(self._work, f"its tensor-parallel peers, with {self._what}")
        return self._finish()


class ProcessTensorGroup(TensorGroup):
    """Tensor-parallel peers that talk through a process group.

    Args:
        group: the ranks.
    """

    def __init__(self, group: RankGroup) -> None:
        self.rank, self.size = group.rank, group.size
        self._ranks = group
        self._has_reduce_scatter = dist.get_backend(group.process_group) == "nccl"

    def start_all_reduce(self, tensor: Tensor) -> Pending:
        work = dist.all_reduce(tensor, group=self._ranks.process_group, async_op=True)
        return _Waiting(work, f"the sum of {_shape(tensor)}", lambda: tensor)

    def start_all_gather(self, tensor: Tensor, dim: int) -> Pending:
        parts = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for _ in range(self.size)]
        work = dist.all_gather(parts, tensor.contiguous(), group=self._ranks.process_group, async_op=True)
        return _Waiting(work, f"a gathering of {_shape(tensor)}", lambda: torch.cat(parts, dim))

    def start_reduce_scatter(self, tensor: Tensor, dim: int) -> Pending:
        what = f"the scattered sum of {_shape(tensor)}"
        if self._has_reduce_scatter:
            parts = [part.contiguous() for part in tensor.chunk(self.size, dim)]
            own = torch.empty_like(parts[self.rank])
            return _Waiting(
                dist.reduce_scatter(own, parts, group=self._ranks.process_group, async_op=True), what, lambda: own
            )
        # Gloo's own sums all of it too, and copies more.
        total = tensor.clone(memory_format=torch.contiguous_format)
        work = dist.all_reduce(total, group=self._ranks.process_group, async_op=True)
        return _Waiting(work, what, lambda: total.chunk(self.size, dim)[self.rank].clone())


def logical_shape(parameter: nn.Parameter) -> tuple[int, ...]:
    """Return the shape of the logical tensor that a parameter is, or is a part of."""
    shard = shard_of(parameter)
    return whole_shape(parameter) if shard is None else shard.whole_shape(whole_shape(parameter))


def join_shards(own: Tensor, parameter: nn.Parameter, group: TensorGroup | None) -> Tensor:
    """Return the logical tensor of what each tensor-parallel rank has of a parameter. All of them call this together.

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
