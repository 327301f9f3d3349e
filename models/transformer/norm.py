"""Norms of tokens and of heads, by type.

Source: Ba et al. 2016, "Layer Normalization"; Zhang & Sennrich 2019, "Root Mean Square Layer Normalization".
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipekit.models.transformer.documents import passing_positions
from pipekit.tensor_parallel import (
    SHARDED,
    Shard,
    TensorGroup,
    TensorParallelModule,
    copy_to_shards,
    mark_partial_gradient,
    shard_parameter,
    sum_partials,
)

Norm = Literal["layer", "rms", "offset_rms"]
"""Layer norm, root-mean-square norm, or the latter with 1 + weight, as in Gemma."""


class OffsetRMSNorm(nn.Module):
    """Root-mean-square norm whose result is multiplied by 1 + `weight`, in fp32: `(..., D)` to `(..., D)`."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        return (F.rms_norm(x.to(wide), self.weight.shape, eps=self.eps) * (1 + self.weight.to(wide))).to(x.dtype)


class HeadsRMSNorm(TensorParallelModule):
    """RMS norm of all heads of a token together, sharded over tensor-parallel ranks: `(B, S, H * E)` to the same.

    If there are fewer heads than ranks, several ranks have the same head, as in `KeyValueLinear`.

    Args:
        num_heads: H; a multiple or a divisor of the tensor-parallel degree.
        head_size: E.
        eps: added to the mean square.
    """

    def __init__(self, num_heads: int, head_size: int, *, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(num_heads * head_size))
        self.num_heads, self.head_size, self.eps = num_heads, head_size, eps

    def shard(self, group: TensorGroup, *, sequence_parallel: bool) -> None:
        super().shard(group, sequence_parallel=sequence_parallel)
        if self.num_heads % group.size == 0:
            shard_parameter(self, "weight", Shard(0, (len(self.weight),), group.rank, group.size))
        else:
            mark_partial_gradient(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        if self.group is None:
            return F.rms_norm(x, x.shape[-1:], self.weight, self.eps)
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        # Ranks have equally many elements, and each element occurs on equally many ranks.
        partial = wide.square().mean(-1, keepdim=True) / self.group.size
        mean_square = copy_to_shards(sum_partials(partial, self.group), self.group)
        weight: Tensor = self.weight
        if len(weight) != x.shape[-1]:
            head = self.group.rank * self.num_heads // self.group.size
            weight = weight[head * self.head_size : (head + 1) * self.head_size]
        return (wide * (mean_square + self.eps).rsqrt() * weight).to(x.dtype)


class FinalNorm(nn.LayerNorm):
    """Layer norm of every token: `(B, S, D)` to `(B, S, D)`."""

    sequence_flow = SHARDED
    supports_cache = True
    takes_documents = True
    forward = passing_positions(nn.LayerNorm.forward)  # type: ignore[assignment]


class FinalRMSNorm(nn.RMSNorm):
    """Root-mean-square norm of every token: `(B, S, D)` to `(B, S, D)`."""

    sequence_flow = SHARDED
    supports_cache = True
    takes_documents = True
    forward = passing_positions(nn.RMSNorm.forward)  # type: ignore[assignment]


class FinalOffsetRMSNorm(OffsetRMSNorm):
    """Root-mean-square norm of every token, times 1 + `weight`: `(B, S, D)` to `(B, S, D)`."""

    sequence_flow = SHARDED
    supports_cache = True
    takes_documents = True
    forward = passing_positions(OffsetRMSNorm.forward)  # type: ignore[assignment]


NORMS: dict[Norm, Callable[..., nn.Module]] = {
    "layer": nn.LayerNorm,
    "rms": nn.RMSNorm,
    "offset_rms": OffsetRMSNorm,
}

FINAL_NORMS: dict[Norm, type[nn.Module]] = {
    "layer": FinalNorm,
    "rms": FinalRMSNorm,
    "offset_rms": FinalOffsetRMSNorm,
}
