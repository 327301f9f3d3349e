"""Blocks of a transformer: causal self-attention and the MLP, in two halves or in parallel, and the norm after them.

The heads and the width of the MLP are sharded over tensor-parallel ranks; activations between layers may be sharded
along the sequence.

Shapes: B sequences, S tokens, D hidden size, H heads, E head size (D = H * E), F feed-forward size.

`dropout` is the probability of zeroing an attention weight and an output, `eps` that of the norms, `init_std` the
standard deviation of the initial weights, and `residual_std` that of the last projection of attention or MLP.
`residual_scale` multiplies the output that a block adds to its input; it is 1 except under progressive layer drop.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any, Literal, TypeVar

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from pipekit.errors import LayoutError
from pipekit.layers.attention_core import recompute_core
from pipekit.models.family import AttentionHeads
from pipekit.models.sparsity import BlockLayouts
from pipekit.models.transformer.cache import KeyValueCache
from pipekit.models.transformer.documents import (
    Hidden,
    number_documents,
    take_positions,
)
from pipekit.models.transformer.flex import attend_flexibly
from pipekit.models.transformer.norm import NORMS, HeadsRMSNorm, Norm
from pipekit.models.transformer.rotary import Rotary
from pipekit.models.transformer.sparse import HeadLayouts, Weighing, attend_sparsely
from pipekit.tensor_parallel import (
    SHARDED,
    ColumnParallelLinear,
    KeyValueLinear,
    RowParallelLinear,
    TensorGroup,
    TensorParallelModule,
    add_adapters,
    cap_softly,
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

NormPlace = Literal["before", "after", "both"]
"""Norm of the input of attention or MLP, of its output, or one of each."""

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


class _NormedModule(TensorParallelModule):
    """Base of attention and MLP: norms of their input and output, and dropout."""

    sequence_flow = SHARDED
    residual_scale = 1.0

    def __init__(self, hidden_size: int, *, norm: Norm, norm_place: NormPlace, eps: float, dropout: float) -> None:
        super().__init__()
        self.norm = nn.Identity() if norm_place == "after" else NORMS[norm](hidden_size, eps=eps)
        self.post_norm = nn.Identity() if norm_place == "before" else NORMS[norm](hidden_size, eps=eps)
        self.norms_outputs, self.dropout = norm_place != "before", dropout

    def _finish(self, y: Tensor) -> Tensor:
        y = self.post_norm(y) if self.norms_outputs else y
        if not self.training:
            return y
        return sharded_dropout(y, self.dropout, True, self.group if self.sequence_parallel else None)


class Attention(_NormedModule):
    """`dropout(attention(norm(x)))`: causal self-attention with H heads, `(B, S, D)` to `(B, S, D)`.

    If there are fewer heads of keys and values than of queries, several heads of queries share one of them.

    Args:
        hidden_size: D.
        num_heads: H.
        num_kv_heads: K, heads of keys and values; None for H.
        head_size: E; None for D / H.
        joint: whether one projection computes queries, keys and values even if K is less than H; the tensor-parallel
            degree must then divide K.
        rotary: rotation of queries and keys; None if positions are added to the tokens.
        norm: type of the norms.
        norm_place: position of the norms.
        bias: whether queries, keys and values have a bias.
        projection_bias: whether the last projection has a bias.
        qk_norm: norms of queries and keys, of each head separately or over the width of all heads.
        window: number of tokens that a token attends to, including itself; None for all earlier tokens.
        layouts: layouts of the blocks of tokens that blocks of tokens attend to; None for all blocks.
        scale: factor of the scores; None for `E ** -0.5`.
        soft_cap: limit that the scores approach before their softmax; None for no limit.

    Source: Ainslie et al. 2023, "GQA: Training Generalized Multi-Query Transformer Models from Multi-Head Checkpoints";
    Jiang et al. 2023, "Mistral 7B".
    """

    cache: KeyValueCache | None = None
    recomputes_attention = False

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        *,
        num_kv_heads: int | None = None,
        head_size: int | None = None,
        joint: bool = False,
        rotary: Rotary | None = None,
        norm: Norm = "layer",
        norm_place: NormPlace = "before",
        bias: bool = True,
        projection_bias: bool = True,
        qk_norm: Literal["head", "width"] | None = None,
        window: int | None = None,
        layouts: BlockLayouts | None = None,
        scale: float | None = None,
        soft_cap: float | None = None,
        dropout: float,
        eps: float,
        init_std: float,
        residual_std: float,
    ) -> None:
        super().__init__(hidden_size, norm=norm, norm_place=norm_place, eps=eps, dropout=dropout)
        num_kv_heads = num_kv_heads or num_heads
        self.heads = AttentionHeads(num_heads, num_kv_heads, joint=joint)
        self.head_size = head_size or hidden_size // num_heads
        self.own_heads = [num_heads, num_kv_heads, num_kv_heads]  # this rank's, of queries, keys and values
        widths = [num * self.head_size for num in self.own_heads]
        build = partial(_build_linear, std=init_std, bias=bias)
        self.qkv: ColumnParallelLinear | None = None
        if joint or num_kv_heads == num_heads:
            self.qkv = build(ColumnParallelLinear, hidden_size, sum(widths), blocks=widths)
        else:
            self.q = build(ColumnParallelLinear, hidden_size, widths[0])
            self.kv = build(KeyValueLinear, hidden_size, num_kv_heads, self.head_size)
        if qk_norm == "head":
            self.q_norm, self.k_norm = (NORMS[norm](self.head_size, eps=eps) for _ in range(2))
        elif qk_norm == "width":
            self.q_norm = HeadsRMSNorm(num_heads, self.head_size, eps=eps)
            self.k_norm = HeadsRMSNorm(num_kv_heads, self.head_size, eps=eps)
        self.qk_norm = qk_norm
        self.projection = _build_linear(
            RowParallelLinear, widths[0], hidden_size, std=residual_std, bias=projection_bias
        )
        self.rotary, self.window, self.soft_cap = rotary, window, soft_cap
        self.scale = self.head_size**-0.5 if scale is None else scale
        self.layouts = None if layouts is None else HeadLayouts(layouts, 0, num_heads)

    def shard(self, group: TensorGroup, *, sequence_parallel: bool) -> None:
        super().shard(group, sequence_parallel=sequence_parallel)
        if fault := self.heads.fault(group.size):
            raise LayoutError(fault.message)
        self.own_heads = [num // group.size for num in self.own_heads]
        if self.layouts is not None:
            own = self.own_heads[0]
            self.layouts = HeadLayouts(self.layouts.of_model, group.rank * own, own)
        if self.qk_norm == "head":
            # Each rank has the gradients of its own heads.
            for parameter in (*self.q_norm.parameters(), *self.k_norm.parameters()):
                mark_partial_gradient(parameter)

    def forward(self, x: Tensor, positions: Tensor | None = None) -> Tensor:
        documents = None if positions is None else number_documents(positions)
        tensors = (*self._project(self.norm(x), positions), documents)
        if self.recomputes_attention and torch.is_grad_enabled():
            y = recompute_core(self._attend, *tensors, draws=self.training and self.dropout > 0)
        else:
            y = self._attend(*tensors)  # (B, H, S, E)
        y = y.reshape(len(y), 1, -1) if y.shape[2] == 1 else y.transpose(1, 2).flatten(2)
        y = self.projection(y)  # (B, S, D)
        return self._finish(y) if self.training or self.norms_outputs else y

    def _project(self, x: Tensor, positions: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values `(B, heads, S, E)` of this rank's heads."""
        if self.qkv is not None:
            joint = self.qkv(x)
            if self.qk_norm is None and self.rotary is None:  # in one view, where a token of a small model waits
                q, k, v = self._split_heads(joint).split_with_sizes(self.own_heads, 1)
                return q, k, v
            q, k, v = joint.split_with_sizes([num * self.head_size for num in self.own_heads], -1)
        else:
            own = [(self.q.weight, self.q.bias), self.kv.own()]
            q, kv = column_parallel_linears(x, own, self.group, sequence_parallel=self.sequence_parallel)
            q, kv = add_adapters(self.q, x, q), add_adapters(self.kv, x, kv)
            k, v = kv.chunk(2, dim=-1)
        if self.qk_norm == "width":
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = self._split_heads(q), self._split_heads(k), self._split_heads(v)
        if self.qk_norm == "head":
            q, k = self.q_norm(q), self.k_norm(k)
        if self.rotary is None:
            return q, k, v
        if self.cache is not None:
            return (*self.rotary.turn(q, k, *self.cache.rotation(self.rotary, q.dtype)), v)
        return (*self.rotary.rotate(q, k, positions), v)

    def _split_heads(self, x: Tensor) -> Tensor:
        """`(B, S, heads * E)` to `(B, heads, S, E)`."""
        batch, length, _ = x.shape
        if length == 1:  # as in generation: the order of elements is the same
            return x.view(batch, -1, 1, self.head_size)
        return x.view(batch, length, -1, self.head_size).transpose(1, 2)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, documents: Tensor | None) -> Tensor:
        """Weighted sums of the values, `(B, heads, S, E)`, within the `documents` `(B, S)` if these are given."""
        length = q.shape[2]
        if self.cache is not None:
            k, v = self.cache.extend(self, k, v, self.window)
            if self.cache.sees_all and self.layouts is None and self.soft_cap is None and q.shape[1] == k.shape[1]:
                return F.scaled_dot_product_attention(q, k, v, scale=self.scale)
            if self.cache.num_slots or self.cache.padding is not None:
                return self._weigh_masked(q, k, v, self.cache.mask(k.shape[2], self.window, self.layouts))
        window = length if self.window is None else self.window
        dropout = self.dropout if self.training else 0.0
        # Flex attention drops nothing out.
        if q.is_cuda and not dropout and (documents is not None or self.layouts is not None):
            return attend_flexibly(
                q,
                k,
                v,
                documents=documents,
                layouts=self.layouts,
                window=window,
                scale=self.scale,
                soft_cap=self.soft_cap,
            )
        if self.layouts is not None:
            weighing = Weighing(self.scale, self.soft_cap, self.window, dropout)
            if dropout:
                with sharded_randomness(self.group):
                    weighing = replace(weighing, seed=int(torch.randint(2**62, (), device="cpu")))
            return attend_sparsely(q, k, v, self.layouts, weighing, documents)
        size = block_size(length, window)
        if size is None:
            return self._weigh(q, k, v, window, documents)
        # Each block of tokens attends to itself and the one before: far less than all tokens to all.
        others_documents = None
        if documents is not None:
            blocks = rearrange(documents, "b (n s) -> b n s", s=size)
            documents, others_documents = blocks[:, 0], torch.cat([blocks[:, :-1], blocks[:, 1:]], dim=2).flatten(0, 1)
        first = self._weigh(q[:, :, :size], k[:, :, :size], v[:, :, :size], window, documents)
        queries = rearrange(q[:, :, size:], "b h (n s) e -> (b n) h s e", s=size)
        keys, values = (rearrange(each, "b h (n s) e -> b n h s e", s=size) for each in (k, v))
        keys, values = (torch.cat([each[:, :-1], each[:, 1:]], dim=3).flatten(0, 1) for each in (keys, values))
        others = self._weigh(queries, keys, values, window, others_documents)
        return torch.cat([first, rearrange(others, "(b n) h s e -> b h (n s) e", b=len(q))], dim=2)

    def _weigh(self, q: Tensor, k: Tensor, v: Tensor, window: int, documents: Tensor | None) -> Tensor:
        """Weighted sums of the values, `(B, heads, S, E)`, where the queries are of the last S tokens of the keys.

        The keys are those of tokens of the `documents`; None where all are of one.
        """
        num_queries, num_keys = q.shape[2], k.shape[2]
        if self.soft_cap is None and documents is None and num_queries == num_keys <= window:
            return self._weigh_masked(q, k, v, None, is_causal=True)
        positions = torch.arange(num_keys, device=q.device)
        distances = positions[num_keys - num_queries :].unsqueeze(1) - positions
        mask = (distances >= 0) & (distances < window)
        if documents is not None:
            is_same = documents[:, num_keys - num_queries :, None] == documents[:, None]  # (B, S, T)
            mask = (mask & is_same).unsqueeze(1)
        return self._weigh_masked(q, k, v, mask)

    def _weigh_masked(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, *, is_causal: bool = False) -> Tensor:
        """Weighted sums of the values, `(B, heads, S, E)`, where the mask is True for a query and a key."""
        heads, length = q.shape[1:3]
        is_grouped = heads != k.shape[1]
        if is_grouped and length == 1:
            # The queries that share a head of keys and values are as many queries of one head.
            q = q.reshape(len(q), k.shape[1], heads // k.shape[1], q.shape[3])
            if mask is not None and mask.dim() == 4 and mask.shape[1] == heads:
                mask = mask.reshape(len(mask), *q.shape[1:3], mask.shape[3])
        elif is_grouped and not is_causal:
            # With a mask, torch's fast kernels know no grouped heads.
            k, v = (each.repeat_interleave(heads // each.shape[1], dim=1) for each in (k, v))
        dropout = self.dropout if self.training else 0.0
        # The heads are shared out, whether the sequence is or not.
        with sharded_randomness(self.group) if dropout else nullcontext():
            if self.soft_cap is None:
                y = F.scaled_dot_product_attention(
                    q,
                    k,
                    v,
                    attn_mask=mask,
                    dropout_p=dropout,
                    is_causal=is_causal,
                    scale=self.scale,
                    enable_gqa=q.shape[1] != k.shape[1],
                )
            else:
                scores = cap_softly(q @ k.transpose(2, 3) * self.scale, self.soft_cap)
                if mask is not None:
                    scores = scores.masked_fill(~mask, -torch.inf)
                # In fp32 at the least, as in a fused attention.
                weights = scores.softmax(-1, dtype=torch.promote_types(q.dtype, torch.float32)).to(q.dtype)
                y = F.dropout(weights, dropout) @ v
        return y.reshape(len(y), heads, length, self.head_size) if y.shape[1] != heads else y


def block_size(length: int, window: int) -> int | None:
    """Length of the blocks into which a sequence is split, so that each block attends to itself and the previous one.

    None if there is no such length, or if it would save nothing.

    Example:
        >>> block_size(8192, 2047), block_size(8192, 4096), block_size(8191, 4096), block_size(4096, 4096)
        (2048, 4096, None, None)
    """
    for size in range(window, length // 2 + 1):
        if length % size == 0:
            return size
    return None


class AttentionHalf(Attention):
    """`x + dropout(attention(norm(x)))`: the first half of a block, `(B, S, D)` to `(B, S, D)`."""

    supports_cache = True
    takes_documents = True

    def forward(self, x: Hidden) -> Hidden:  # type: ignore[override]
        x, positions = take_positions(x)
        y = Attention.forward(self, x, positions)
        y = x + y if self.residual_scale == 1 else torch.add(x, y, alpha=self.residual_scale)
        return y if positions is None else (y, positions)


class MLP(_NormedModule):
    """`dropout(mlp(norm(x)))`: `(B, S, D)` to `(B, S, D)` through a width of F.

    Args:
        hidden_size: D.
        ffn_size: F.
        activation: activation function between the two linear layers.
        gated: whether the outputs of a further linear layer multiply those of the activation function.
        norm: type of the norms.
        norm_place: position of the norms.
        bias: whether the linear layers have biases.

    Source: Shazeer 2020, "GLU Variants Improve Transformer".
    """

    def __init__(
        self,
        hidden_size: int,
        ffn_size: int,
        *,
        activation: Activation,
        gated: bool = False,
        norm: Norm = "layer",
        norm_place: NormPlace = "before",
        bias: bool = True,
        dropout: float,
        eps: float,
        init_std: float,
        residual_std: float,
    ) -> None:
        super().__init__(hidden_size, norm=norm, norm_place=norm_place, eps=eps, dropout=dropout)
        self.gate_and_up: ColumnParallelLinear | None = None
        if gated:
            self.gate_and_up = _build_linear(
                ColumnParallelLinear, hidden_size, 2 * ffn_size, std=init_std, bias=bias, blocks=(ffn_size,) * 2
            )
        else:
            self.expand = _build_linear(ColumnParallelLinear, hidden_size, ffn_size, std=init_std, bias=bias)
        self.contract = _build_linear(RowParallelLinear, ffn_size, hidden_size, std=residual_std, bias=bias)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        x, activation = self.norm(x), _ACTIVATIONS[self.activation]
        if self.gate_and_up is None:
            y = activation(self.expand(x))  # (B, S, F)
        else:
            gate, up = self.gate_and_up(x).chunk(2, -1)  # (B, S, F) each
            y = activation(gate) * up
        y = self.contract(y)  # (B, S, D)
        return self._finish(y) if self.training or self.norms_outputs else y


class MLPHalf(MLP):
    """`x + dropout(mlp(norm(x)))`: the second half of a block, `(B, S, D)` to `(B, S, D)`."""

    supports_cache = True
    takes_documents = True

    def forward(self, x: Hidden) -> Hidden:  # type: ignore[override]
        x, positions = take_positions(x)
        y = MLP.forward(self, x)
        y = x + y if self.residual_scale == 1 else torch.add(x, y, alpha=self.residual_scale)
        return y if positions is None else (y, positions)


class ParallelBlock(TensorParallelModule):
    """`x + dropout(attention(norm(x))) + dropout(mlp(other_norm(x)))`: `(B, S, D)` to `(B, S, D)`.

    Source: Wang & Komatsuzaki 2021, "GPT-J-6B".
    """

    sequence_flow = SHARDED
    supports_cache = True
    takes_documents = True
    residual_scale = 1.0

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        ffn_size: int,
        *,
        rotary: Rotary | None = None,
        window: int | None = None,
        layouts: BlockLayouts | None = None,
        activation: Activation,
        dropout: float,
        eps: float,
        init_std: float,
        residual_std: float,
    ) -> None:
        super().__init__()
        common: dict[str, Any] = {"dropout": dropout, "eps": eps, "init_std": init_std, "residual_std": residual_std}
        self.attention = Attention(hidden_size, num_heads, rotary=rotary, window=window, layouts=layouts, **common)
        self.mlp = MLP(hidden_size, ffn_size, activation=activation, **common)

    def forward(self, x: Hidden) -> Hidden:
        x, positions = take_positions(x)
        attended: Tensor = self.attention(x, positions)
        expanded: Tensor = self.mlp(x)
        y = x.add(attended, alpha=self.residual_scale).add(expanded, alpha=self.residual_scale)
        return y if positions is None else (y, positions)
