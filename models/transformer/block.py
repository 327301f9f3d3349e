"""Blocks of a transformer: causal self-attention and the MLP, in two halves or in parallel, and the norm after them.

Tensor-parallel ranks share out the heads and the width of the MLP, and what is between layers along the sequence.

Shapes: B sequences, S tokens, D hidden size, H heads, E head size (D = H * E), F feed-forward size.

`dropout` is the probability of zeroing an attention weight and an output, `eps` is of the norms, `init_std` the
standard deviation of the initial weights, and `residual_std` that of the last projection of attention or MLP.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any, Literal, TypeVar

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from pipekit.errors import LayoutError
from pipekit.models.family import AttentionHeads
from pipekit.models.transformer.norm import NORMS, Norm
from pipekit.models.transformer.rotary import Rotary
from pipekit.tensor_parallel import (
    SHARDED,
    ColumnParallelLinear,
    KeyValueLinear,
    RowParallelLinear,
    TensorGroup,
    TensorParallelModule,
    column_parallel_linears,
    mark_partial_gradient,
    sharded_dropout,
    sharded_randomness,
)

Activation = Literal["gelu", "gelu_tanh", "silu"]

_ACTIVATIONS: dict[Activation, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "silu": F.silu,
}

_Linear = TypeVar("_Linear", bound=nn.Linear)


def _build_linear(kind: Callable[..., _Linear], *args: Any, std: float, **kwargs: Any) -> _Linear:
    """Linear layer with normal weights of standard deviation `std`, and a bias of zero where it has one."""
    # Without nn.Linear's own initial weights, which would be drawn only to be replaced.
    with torch.device("meta"):
        linear = kind(*args, **kwargs)
    linear.to_empty(device=torch.get_default_device())
    nn.init.normal_(linear.weight, std=std)
    if linear.bias is not None:
        nn.init.zeros_(linear.bias)
    return linear


class Attention(TensorParallelModule):
    """`dropout(attention(norm(x)))`: causal self-attention with H heads, `(B, S, D)` to `(B, S, D)`.

    Where there are fewer heads of keys and values, several heads of queries share one of them.

    Args:
        hidden_size: D.
        num_heads: H.
        num_kv_heads: heads of keys and values; None is H.
        head_size: E; None is D / H.
        rotary: rotation of queries and keys; None where positions are added to the tokens.
        norm: kind of the norm.
        bias: whether queries, keys and values have a bias.
        projection_bias: whether the last projection has one.
        qk_norm: whether the queries and the keys of each head have a norm of their own.
        window: tokens that a token attends to, its own included; None is all before it.
        scale: factor of the scores; None is 1 / sqrt(E).
        post_norm: whether the outputs have a norm, too.

    Source: Ainslie et al. 2023, "GQA: Training Generalized Multi-Query Transformer Models from Multi-Head Checkpoints";
    Jiang et al. 2023, "Mistral 7B".
    """

    sequence_flow = SHARDED

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        *,
        num_kv_heads: int | None = None,
        head_size: int | None = None,
        rotary: Rotary | None = None,
        norm: Norm = "layer",
        bias: bool = True,
        projection_bias: bool = True,
        qk_norm: bool = False,
        window: int | None = None,
        scale: float | None = None,
        post_norm: bool = False,
        dropout: float,
        eps: float,
        init_std: float,
        residual_std: float,
    ) -> None:
        super().__init__()
        self.heads = AttentionHeads(num_heads, num_kv_heads or num_heads)
        self.head_size = head_size or hidden_size // num_heads
        width = num_heads * self.head_size
        self.norm = NORMS[norm](hidden_size, eps=eps)
        self.qkv: ColumnParallelLinear | None = None
        if self.heads.num_kv_heads == num_heads:
            self.qkv = _build_linear(
                ColumnParallelLinear, hidden_size, 3 * width, std=init_std, bias=bias, blocks=(width,) * 3
            )
        else:
            self.q = _build_linear(ColumnParallelLinear, hidden_size, width, std=init_std, bias=bias)
            self.kv = _build_linear(
                KeyValueLinear, hidden_size, self.heads.num_kv_heads, self.head_size, std=init_std, bias=bias
            )
        if qk_norm:
            self.q_norm, self.k_norm = NORMS[norm](self.head_size, eps=eps), NORMS[norm](self.head_size, eps=eps)
        self.qk_norm = qk_norm
        self.projection = _build_linear(RowParallelLinear, width, hidden_size, std=residual_std, bias=projection_bias)
        self.post_norm = NORMS[norm](hidden_size, eps=eps) if post_norm else None
        self.rotary, self.window, self.scale, self.dropout = rotary, window, scale, dropout

    def shard(self, group: TensorGroup, *, sequence_parallel: bool) -> None:
        super().shard(group, sequence_parallel=sequence_parallel)
        if fault := self.heads.fault(group.size):
            raise LayoutError(fault.message)
        if self.qk_norm:
            # Each rank has the gradients of its own heads.
            for parameter in (*self.q_norm.parameters(), *self.k_norm.parameters()):
                mark_partial_gradient(parameter)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self._project(self.norm(x))
        if self.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        if self.rotary is not None:
            q, k = self.rotary.rotate(q, k)
        dropout = self.dropout if self.training else 0.0
        mask = self._window_mask(q)
        # The heads are shared out, whether the sequence is or not.
        with sharded_randomness(self.group) if dropout else nullcontext():
            y = F.scaled_dot_product_attention(
                q,
                k,
                v,
                attn_mask=mask,
                dropout_p=dropout,
                is_causal=mask is None,
                scale=self.scale,
                enable_gqa=q.shape[1] != k.shape[1],
            )  # (B, H, S, E)
        y = self.projection(rearrange(y, "b h s e -> b s (h e)"))  # (B, S, D)
        y = y if self.post_norm is None else self.post_norm(y)
        return sharded_dropout(y, self.dropout, self.training, self.group if self.sequence_parallel else None)

    def _window_mask(self, q: Tensor) -> Tensor | None:
        """True where a query attends to a key, `(S, S)`; None where that is all of them up to its own."""
        length = q.shape[2]
        if self.window is None or length <= self.window:
            return None
        positions = torch.arange(length, device=q.device)
        distance = positions.unsqueeze(1) - positions
        return (distance >= 0) & (distance < self.window)

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


class MLP(TensorParallelModule):
    """`dropout(mlp(norm(x)))`: `(B, S, D)` to `(B, S, D)` through a width of F.

    Args:
        hidden_size: D.
        ffn_size: F.
        activation: function between the two linear layers.
        gated: whether another linear layer's outputs multiply those of the function.
        norm: kind of the norm.
        bias: whether the linear layers have biases.
        post_norm: whether the outputs have a norm, too.

    Source: Shazeer 2020, "GLU Variants Improve Transformer".
    """

    sequence_flow = SHARDED

    def __init__(
        self,
        hidden_size: int,
        ffn_size: int,
        *,
        activation: Activation,
        gated: bool = False,
        norm: Norm = "layer",
        bias: bool = True,
        post_norm: bool = False,
        dropout: float,
        eps: float,
        init_std: float,
        residual_std: float,
    ) -> None:
        super().__init__()
        self.norm = NORMS[norm](hidden_size, eps=eps)
        self.gate_and_up: ColumnParallelLinear | None = None
        if gated:
            self.gate_and_up = _build_linear(
                ColumnParallelLinear, hidden_size, 2 * ffn_size, std=init_std, bias=bias, blocks=(ffn_size,) * 2
            )
        else:
            self.expand = _build_linear(ColumnParallelLinear, hidden_size, ffn_size, std=init_std, bias=bias)
        self.contract = _build_linear(RowParallelLinear, ffn_size, hidden_size, std=residual_std, bias=bias)
        self.post_norm = NORMS[norm](hidden_size, eps=eps) if post_norm else None
        self.activation, self.dropout = activation, dropout

    def forward(self, x: Tensor) -> Tensor:
        x, activation = self.norm(x), _ACTIVATIONS[self.activation]
        if self.gate_and_up is None:
            y = activation(self.expand(x))  # (B, S, F)
        else:
            gate, up = self.gate_and_up(x).chunk(2, -1)  # (B, S, F) each
            y = activation(gate) * up
        y = self.contract(y)  # (B, S, D)
        y = y if self.post_norm is None else self.post_norm(y)
        return sharded_dropout(y, self.dropout, self.training, self.group if self.sequence_parallel else None)


class MLPHalf(MLP):
    """`x + dropout(mlp(norm(x)))`: the second half of a block, `(B, S, D)` to `(B, S, D)`."""

    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


class ParallelBlock(TensorParallelModule):
    """`x + dropout(attention(norm(x))) + dropout(mlp(other_norm(x)))`: `(B, S, D)` to `(B, S, D)`.

    Source: Wang & Komatsuzaki 2021, "GPT-J-6B".
    """

    sequence_flow = SHARDED

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        ffn_size: int,
        *,
        rotary: Rotary | None = None,
        activation: Activation,
        dropout: float,
        eps: float,
        init_std: float,
        residual_std: float,
    ) -> None:
        super().__init__()
        common: dict[str, Any] = {"dropout": dropout, "eps": eps, "init_std": init_std, "residual_std": residual_std}
        self.attention = Attention(hidden_size, num_heads, rotary=rotary, **common)
        self.mlp = MLP(hidden_size, ffn_size, activation=activation, **common)

    def forward(self, x: Tensor) -> Tensor:
        attended: Tensor = self.attention(x)
        expanded: Tensor = self.mlp(x)
        return x + attended + expanded
