"""Low-rank adapters (LoRA) of linear layers: trained in place of the weights, and sharded like the weights.

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
    """Settings of a low-rank adapter: its rank, the scale of its output, and the dropout of its inputs."""

    rank: int
    scale: float
    dropout: float = 0.0


class LowRankAdapter(TensorParallelModule):
    """Low-rank adapter of some outputs of a linear layer: adds `scale * b(a(dropout(x)))`, `(..., I)` to `(..., O)`.

    If tensor-parallel ranks shard the outputs of the linear layer, the rows of `b` are sharded; if they shard its
    inputs, the columns of `a` are. The ranks exchange only R numbers per token between `a` and `b`.

    Args:
        linear: the linear layer.
        blocks: lengths of the blocks of outputs that the adapter adds to, each of which is sharded separately.
        low_rank: settings of the adapter.

    Attributes:
        a: `(R, I)`, initialized like the weight of a torch linear layer.
        b: `(O, R)`, initially zero, so nothing is added.
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
        """Return the adapter's output for inputs of the linear layer, in the form of the layer's outputs."""
        own_mask = self.group if self.sequence_parallel or self._shards_inputs else None
        dropped = sharded_dropout(x, self.low_rank.dropout, self.training, own_mask)
        reduced = F.linear(dropped, self.a) * self.low_rank.scale  # (..., R)
        if self._shards_inputs:
            return F.linear(reduced if self.group is None else self.sum_outputs(reduced), self.b)
        b = self.b if self._own_rows is None else torch.cat([self.b[rows] for rows in self._own_rows])
        return column_parallel_linear(reduced, b, None, self.group, sequence_parallel=self.sequence_parallel)


class LowRankAdapters(nn.Module):
    """Adapters of one linear layer, each for a part of its outputs.

    Args:
        linear: the linear layer.
        parts: number of outputs of each part, in order; the parts must cover all outputs.
        adapted: names of the parts that have an adapter; the adapter has the same name.
        low_rank: settings of the adapters.

    Raises:
        ConfigError: if a part of a column-parallel layer does not consist of whole blocks.
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
        """Return this rank's outputs `y`, given their number in each block, plus the outputs of the adapters."""
        name, span = self._spans[0]
        if span == slice(0, len(self.blocks)):
            return y + self.get_submodule(name)(x)  # type: ignore[no-any-return]
        pieces = list(torch.split(y, list(own_blocks), -1))
        for name, span in self._spans:
            added = torch.split(self.get_submodule(name)(x), list(own_blocks[span]), -1)
            pieces[span] = [piece + more for piece, more in zip(pieces[span], added, strict=True)]
        return torch.cat(pieces, dim=-1)


def attach_adapters(linear: nn.Linear, parts: Mapping[str, int], adapted: Sequence[str], low_rank: LowRank) -> None:
    """Attach adapters to a whole linear layer as its submodule `lora`; calls of the layer then add their outputs.

    The arguments are those of `LowRankAdapters`.
    """
    linear.lora = LowRankAdapters(linear, parts, adapted, low_rank)
    linear.register_forward_hook(_add_to_outputs, with_kwargs=True)


def add_adapters(linear: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Add the outputs of a linear layer's adapters for inputs `x` to its outputs `y`; without adapters, return `y`.

    For code that computes with the weights of a linear layer without calling the layer.
    """
    adapters = getattr(linear, "lora", None)
    if adapters is None:
        return y
    own_blocks = linear.own_blocks if isinstance(linear, ColumnParallelLinear) else adapters.blocks
    outputs: Tensor = adapters(x, y, own_blocks)
    return outputs


def _add_to_outputs(linear: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Tensor) -> Tensor:
    return add_adapters(linear, args[0] if args else kwargs["input"], output)
