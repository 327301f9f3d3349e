"""Whole tensors of an optimizer whose ranks hold shards of them, over replicas and over tensor parallelism."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from torch import Tensor, nn

from pipekit.deepspeed.optimizer_view import OptimizerView
from pipekit.distributed.mpu import ModelParallelUnit
from pipekit.engine.tensor_group import join_shards
from pipekit.optimizers.whole_tensors import Piece, WholeTensors
from pipekit.tensor_parallel import TensorGroup
from pipekit.tensor_parallel.shards import shard_of


class SharedTensors(WholeTensors):
    """Logical tensors of a stage, of which each of its ranks updates a part.

    Every rank of the stage makes the same calls in the same order.

    Args:
        view: knows the parameters behind what the optimizer updates.
        mpu: the process groups.
        tensor_group: the tensor-parallel peers; None where there are none.
    """

    def __init__(self, view: OptimizerView, mpu: ModelParallelUnit, tensor_group: TensorGroup | None) -> None:
        self._pieces = {id(tensor): pieces for tensor, pieces in view.pieces()}
        self._data = mpu.data if view.is_sharded and mpu.data.size > 1 else None
        self._tensor_group = tensor_group
        self._device = torch.device(get_accelerator().current_device_name())

    def pieces(self, tensor: Tensor) -> Sequence[Piece]:
        return self._pieces[id(tensor)]

    def sums(self, own: Tensor, pieces: Sequence[Piece]) -> Tensor:
        sums = own.to(self._device)
        if self._tensor_group is not None:
            # What all tensor-parallel ranks hold counts once.
            counts = [shard_of(piece.parameter) is not None or self._tensor_group.rank == 0 for piece in pieces]
            sums = torch.where(torch.tensor(counts, device=sums.device)[:, None], sums, 0.0)
        if self._data is not None:
            dist.all_reduce(sums, group=self._data.process_group)
        return sums if self._tensor_group is None else self._tensor_group.all_reduce(sums)

    def whole(self, values: Tensor, piece: Piece) -> Tensor:
        own = piece.of(values).to(self._device)
        if self._data is not None:
            joined = own.new_zeros(prod(piece.shape))
            joined[piece.offset : piece.offset + piece.length] = own
            dist.all_reduce(joined, group=self._data.process_group)
            own = joined
        assert isinstance(piece.parameter, nn.Parameter)
        return join_shards(own.view(piece.shape), piece.parameter, self._tensor_group)

    def take(self, whole: Tensor, piece: Piece) -> Tensor:
        shard = shard_of(piece.parameter)
        own = whole if shard is None else shard.take(whole)
        return own.reshape(-1)[piece.offset : piece.offset + piece.length]
