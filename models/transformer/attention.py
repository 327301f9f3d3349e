"""Causal self-attention.

Tensor-parallel ranks share out the heads, and what is between layers along the sequence.

Shapes: B sequences, S tokens, D hidden size, H heads, E head size (D = H * E).
"""

from __future__ import annotations

from contextlib import nullcontext

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from pipekit.errors import LayoutError
from pipekit.models.family import AttentionHeads
from pipekit.models.transformer.linear import build_linear
from pipekit.models.transformer.rotary import Rotary
from pipekit.tensor_parallel import (
    SHARDED,
    ColumnParallelLinear,
    KeyValueLinear,
    RowParallelLinear,
    TensorGroup,
    TensorParallelModule,
    column_parallel_linears,
    sharded_dropout,
    sharded_randomness,
)


class Attention(TensorParallelModule):
    """`dropout(attention(norm(x)))`: causal self-attention with H heads, `(B, S, D)` to `(B, S, D)`.

    Where there are fewer heads of keys and values, several heads of queries share one of them.

    Args:
        hidden_size: D.
        num_heads: H.
        num_kv_heads: heads of keys and values; None is H.
        rotary: rotation of queries and keys; None where positions are added to the tokens.
        dropout: probability of zeroing an attention weight, and an output.
        eps: of the norm.
        init_std: standard deviation of the initial weights.
        residual_std: that of the last projection.

    Source: Ainslie et al. 2023, "GQA: Training Generalized Multi-Query Transformer Models from Multi-Head Checkpoints".
    """

    sequence_flow = SHARDED

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        *,
        num_kv_heads: int | None = None,
        rotary: Rotary | None = None,
        dropout: float,
        eps: float,
        init_std: float,
        residual_std: float,
    ) -> None:
        super().__init__()
        self.heads = AttentionHeads(num_heads, num_kv_heads or num_heads)
        self.head_size = hidden_size // num_heads
        self.norm = nn.LayerNorm(hidden_size, eps=eps)
        if self.heads.num_kv_heads == num_heads:
            self.qkv: ColumnParallelLinear | None = build_linear(
                ColumnParallelLinear, hidden_size, 3 * hidden_size, std=init_std, blocks=(hidden_size,) * 3
            )
        else:
            self.qkv = None
            self.q = build_linear(ColumnParallelLinear, hidden_size, hidden_size, std=init_std)
            self.kv = build_linear(KeyValueLinear, hidden_size, self.heads.num_kv_heads, self.head_size, std=init_std)
        self.projection = build_linear(RowParallelLinear, hidden_size, hidden_size, std=residual_std)
        self.rotary = rotary
        self.dropout = dropout

    def shard(self, group: TensorGroup, *, sequence_parallel: bool) -> None:
        super().shard(group, sequence_parallel=sequence_parallel)
        if fault := self.heads.fault(group.size):
            raise LayoutError(fault.message)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self._project(self.norm(x))
        if self.rotary is not None:
            q, k = self.rotary.rotate(q, k)
        dropout = self.dropout if self.training else 0.0
        # The heads are shared out, whether the sequence is or not.
        with sharded_randomness(self.group) if dropout else nullcontext():
            y = F.scaled_dot_product_attention(
                q, k, v, dropout_p=dropout, is_causal=True, enable_gqa=q.shape[1] != k.shape[1]
            )  # (B, H, S, E)
        y = self.projection(rearrange(y, "b h s e -> b s (h e)"))  # (B, S, D)
        return sharded_dropout(y, self.dropout, self.training, self.group if self.sequence_parallel else None)

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values `(B, heads, S, E)` of this rank's heads."""
        if self.qkv is not None:
            qkv = self.qkv(x)  # (B, S, 3D)
            queries, keys, values = rearrange(qkv, "b s (three h e) -> three b h s e", three=3, e=self.head_size)
            return queries, keys, values
        own = [(self.q.weight, self.q.bias), self.kv.own()]
        q, kv = column_parallel_linears(x, own, self.group, sequence_parallel=self.sequence_parallel)
        keys, values = rearrange(kv, "b s (two h e) -> two b h s e", two=2, e=self.head_size)
        return rearrange(q, "b s (h e) -> b h s e", e=self.head_size), keys, values


class AttentionHalf(Attention):
    """`x + dropout(attention(norm(x)))`: the first half of a block, `(B, S, D)` to `(B, S, D)`."""

    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)
