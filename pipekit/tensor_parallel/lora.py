"""Low-rank adapters (LoRA) of linear layers: trained in place of the weights, and sharded as the weights are.

Shapes: I inputs and O outputs of a linear layer, R rank.

Source: Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models"; Kalajdzievski 2023, "A Rank Stabilization
Scaling Factor for Fine-Tuning with LoRA".
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipekit.errors import ConfigError
from pipekit.tensor_parallel.group import TensorGroup
from pipekit.tensor_parallel.layers import (
    ColumnParallelLinear,
    KeyValueLinear,
    RowParallelLinear,
    TensorParallelModule,
    column_parallel_linear,
)
from pipekit.tensor_parallel.randomness import sharded_dropout
from pipekit.tensor_parallel.shards import Shard, mark_partial_gradient, shard_parameter


@dataclass(frozen=True)
class LowRank:
    """Settings of a low-rank adapter: its rank, the factor of what it adds, and the dropout of its inputs."""

    rank: int
    scale: float
    dropout: float = 0.0


class LowRankAdapter(TensorParallelModule):
    """Low-rank adapter of some outputs of a linear layer: adds `scale * b(a(dropout(x)))`, `(..., I)` to `(..., O)`.

    Where tensor-parallel ranks share out the outputs of the linear layer, they share out the rows of `b`; where they
    share out its inputs, the columns of `a`. Between both only R numbers a token are exchanged.

    Args:
        linear: the linear layer.
        blocks: lengths of the blocks of its outputs that are added to, each of which is sharded by itself.
        low_rank: the settings.

    Attributes:
        a: `(R, I)`, drawn as the weights of a linear layer of torch are.
        b: `(O, R)`, zeros at first, so that nothing is added.
    """

    def __init__(self, linear: nn.Linear, blocks: Sequence[int], low_rank: LowRank) -> None:
        super().__init__()
        self.low_rank, self.blocks = low_rank, tuple(blocks)
        self._shards_inputs = isinstance(linear, RowParallelLinear)
        self._shards_outputs = isinstance(linear, ColumnParallelLinear)
        self._num_heads = linear.num_kv_heads if isinstance(linear, KeyValueLinear) else None
        self._own_rows: list[slice] | None = None
        self.a = nn.Parameter(torch.empty(low_rank.rank, linear.in_features))
        self.b = nn.Parameter(torch.zeros(sum(blocks), low_rank.rank))
        nn.init.kaiming_uniform_(self.a, a=math.sqrt(5))

    def shard(self, group: TensorGroup, *, sequence_parallel: bool) -> None:
        if not (self._shards_inputs or self._shards_outputs):
            return
        super().shard(group, sequence_parallel=sequence_parallel)
        if self._shards_inputs:
            shard_parameter(self, "a", Shard(1, (self.a.shape[1],), group.rank, group.size))
        elif self._num_heads is None or self._num_heads % group.size == 0:
            shard_parameter(self, "b", Shard(0, self.blocks, group.rank, group.size))
        else:
            # As in `KeyValueLinear`: each rank has all heads, and computes one.
            starts = [start for start, _ in zip(accumulate(self.blocks, initial=0), self.blocks, strict=False)]
            head, size = group.rank * self._num_heads // group.size, self.blocks[0] // self._num_heads
            self._own_rows = [slice(start + head * size, start + (head + 1) * size) for start in starts]
            mark_partial_gradient(self.b)

    def forward(self, x: Tensor) -> Tensor:
        """Return the addition for inputs in the form in which the linear layer takes them, in that of its outputs."""
        own_mask = self.group if self.sequence_parallel or self._shards_inputs else None
        dropped = sharded_dropout(x, self.low_rank.dropout, self.training, own_mask)
        reduced = F.linear(dropped, self.a) * self.low_rank.scale  # (..., R)
        if self._shards_inputs:
            return F.linear(reduced if self.group is None else self.sum_outputs(reduced), self.b)
        b = self.b if self._own_rows is None else torch.cat([self.b[rows] for rows in self._own_rows])
        return column_parallel_linear(reduced, b, None, self.group, sequence_parallel=self.sequence_parallel)


class LowRankAdapters(nn.Module):
    """The adapters of one linear layer, each of some of its outputs.

    Args:
        linear: the linear layer.
        parts: number of outputs of each part, in order; together they are all outputs.
        adapted: the parts with an adapter, which has the name of the part.
        low_rank: the settings.

    Raises:
        ConfigError: if a part of a column-parallel layer is not made of whole blocks of it.
    """

    def __init__(self, linear: nn.Linear, parts: Mapping[str, int], adapted: Sequence[str], low_rank: LowRank) -> None:
        super().__init__()
        self.blocks = linear.blocks if isinstance(linear, ColumnParallelLinear) else tuple(parts.values())
        ends, start = list(accumulate(self.blocks, initial=0)), 0
        self._spans: list[tuple[str, slice]] = []
        for name, num_rows in parts.items():
            end = start + num_rows
            if name in adapted:
                if start not in ends or end not in ends:
                    raise ConfigError(
                        f"lora: {name} is rows {start} to {end - 1} of a column-parallel layer with "
                        f"blocks={list(self.blocks)}; give the layer a block for each of its parts"
                    )
                span = slice(ends.index(start), ends.index(end))
                self._spans.append((name, span))
                self.add_module(name, LowRankAdapter(linear, self.blocks[span], low_rank))
            start = end

    def forward(self, x: Tensor, y: Tensor, own_blocks: Sequence[int]) -> Tensor:
        """Return the outputs `y`, of which this rank has so many of each block, with what is added to them."""
        name, span = self._spans[0]
        if span == slice(0, len(self.blocks)):
            return y + self.get_submodule(name)(x)  # type: ignore[no-any-return]
        pieces = list(torch.split(y, list(own_blocks), -1))
        for name, span in self._spans:
            added = torch.split(self.get_submodule(name)(x), list(own_blocks[span]), -1)
            pieces[span] = [piece + more for piece, more in zip(pieces[span], added, strict=True)]
        return torch.cat(pieces, dim=-1)


def attach_adapters(linear: nn.Linear, parts: Mapping[str, int], adapted: Sequence[str], low_rank: LowRank) -> None:
    """Give a linear layer that is built and whole adapters as its submodule `lora`; a call of it then adds to them.

    The arguments are those of `LowRankAdapters`.
    """
    linear.lora = LowRankAdapters(linear, parts, adapted, low_rank)
    linear.register_forward_hook(_add_to_outputs, with_kwargs=True)


def add_adapters(linear: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Return the outputs `y` of a linear layer with what its adapters add for the inputs `x`; `y` if it has none.

    For code that computes with the weights of a linear layer without calling it.
    """
    adapters = getattr(linear, "lora", None)
    if adapters is None:
        return y
    own_blocks = linear.own_blocks if isinstance(linear, ColumnParallelLinear) else adapters.blocks
    outputs: Tensor = adapters(x, y, own_blocks)
    return outputs


def _add_to_outputs(linear: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Tensor) -> Tensor:
    return add_adapters(linear, args[0] if args else kwargs["input"], output)
