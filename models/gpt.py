"""GPT-2 as a list of layer specs.

The attention half and the MLP half of a block are layers of their own, so that a partition can cut a block in
two. Each layer takes one tensor and returns one.

Tensor-parallel ranks share out heads, feed-forward width and vocabulary, and what is between them along the sequence.

Shapes: B sequences, S tokens, D hidden size, H heads, E head size (D = H * E), F feed-forward size, V vocabulary size,
P positions.

Source: Radford et al. 2019, "Language Models are Unsupervised Multitask Learners"; layer norm before each half, learned
positions, tanh-approximated GELU, residual projections initialised smaller with depth.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypeVar

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from pipekit.config import GPTConfig
from pipekit.errors import ConfigError, LayoutError
from pipekit.layers.specs import LayerSpec, TiedLayerSpec
from pipekit.tensor_parallel import (
    SHARDED,
    ColumnParallelLinear,
    KeyValueLinear,
    Logits,
    RowParallelLinear,
    SequenceFlow,
    TensorGroup,
    TensorParallelModule,
    VocabularyParallelEmbedding,
    VocabularyParallelModule,
    column_parallel_linears,
    plan_chunk_tokens,
    sharded_dropout,
    sharded_randomness,
)

LossChunk = int | Literal["auto"] | None


class TokenEmbedding(VocabularyParallelEmbedding):
    """Looks token ids up: `(B, S)` int64 to `(B, S, D)`.

    Its `weight` `(V, D)` is the head's too, where they are tied.
    """

    sequence_flow = SequenceFlow(returns_shard=True)


class PositionEmbedding(TensorParallelModule):
    """Adds a learned vector for each position, then drops out: `(B, S, D)` to `(B, S, D)`.

    Its `weight` is `(P, D)`. The forward raises a ConfigError for a sequence of more than P tokens.
    """

    sequence_flow = SHARDED

    def __init__(self, max_positions: int, hidden_size: int, *, dropout: float, init_std: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(max_positions, hidden_size))
        self.dropout = dropout
        nn.init.normal_(self.weight, std=init_std)

    def forward(self, x: Tensor) -> Tensor:
        parts = self.group if self.sequence_parallel else None
        length, max_positions = x.shape[1], self.weight.shape[0]
        num_tokens, first = (length, 0) if parts is None else (length * parts.size, length * parts.rank)
        if num_tokens > max_positions:
            raise ConfigError(
                f"a sequence of {num_tokens} tokens is longer than model.max_positions={max_positions}; "
                "shorten it, or train a model with more positions"
            )
        x = x + self.weight[first : first + length]  # (B, S, D) + (S, D)
        return sharded_dropout(x, self.dropout, self.training, parts)


class AttentionHalf(TensorParallelModule):
    """`x + attention(norm(x))`: causal self-attention with H heads, `(B, S, D)` to `(B, S, D)`.

    Where there are fewer heads of keys and values, several heads of queries share one of them.

    Source: Ainslie et al. 2023, "GQA: Training Generalized Multi-Query Transformer Models from Multi-Head Checkpoints".
    """

    sequence_flow = SHARDED

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        *,
        num_kv_heads: int | None = None,
        dropout: float,
        eps: float,
        init_std: float,
        residual_std: float,
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.head_size = hidden_size // num_heads
        self.norm = nn.LayerNorm(hidden_size, eps=eps)
        if num_kv_heads in (None, num_heads):
            self.qkv: ColumnParallelLinear | None = _linear(
                ColumnParallelLinear, hidden_size, 3 * hidden_size, std=init_std, blocks=(hidden_size,) * 3
            )
        else:
            self.qkv = None
            self.q = _linear(ColumnParallelLinear, hidden_size, hidden_size, std=init_std)
            self.kv = _linear(KeyValueLinear, hidden_size, num_kv_heads, self.head_size, std=init_std)
        self.projection = _linear(RowParallelLinear, hidden_size, hidden_size, std=residual_std)
        self.dropout = dropout

    def shard(self, group: TensorGroup, *, sequence_parallel: bool) -> None:
        super().shard(group, sequence_parallel=sequence_parallel)
        if self.num_heads % group.size:
            raise LayoutError(
                f"parallel.tp={group.size} does not divide model.num_heads={self.num_heads}, and a rank computes whole "
                f"heads; try parallel.tp={math.gcd(group.size, self.num_heads)}"
            )

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self._project(self.norm(x))
        dropout = self.dropout if self.training else 0.0
        # The heads are shared out, whether the sequence is or not.
        with sharded_randomness(self.group) if dropout else nullcontext():
            y = F.scaled_dot_product_attention(
                q, k, v, dropout_p=dropout, is_causal=True, enable_gqa=q.shape[1] != k.shape[1]
            )  # (B, H, S, E)
        y = self.projection(rearrange(y, "b h s e -> b s (h e)"))  # (B, S, D)
        return x + sharded_dropout(y, self.dropout, self.training, self.group if self.sequence_parallel else None)

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries, keys and values `(B, heads, S, E)` of this rank's heads."""
        if self.qkv is not None:
            qkv = self.qkv(x)  # (B, S, 3D)
            queries, keys, values = rearrange(qkv, "b s (three h e) -> three b h s e", three=3, e=self.head_size)
            return queries, keys, values
        own = [(self.q.weight, self.q.bias), self.kv.own()]
        q, kv = column_parallel_linears(x, own, self.group, sequence_parallel=self.sequence_parallel)
        keys, values = rearrange(kv, "b s (two h e) -> two b h s e", two=2, e=self.head_size)
        return rearrange(q, "b s (h e) -> b h s e", e=self.head_size), keys, values


class MLPHalf(TensorParallelModule):
    """`x + mlp(norm(x))`: `(B, S, D)` to `(B, S, D)` through a width of F."""

    sequence_flow = SHARDED

    def __init__(
        self,
        hidden_size: int,
        ffn_size: int,
        *,
        dropout: float,
        eps: float,
        init_std: float,
        residual_std: float,
    ) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(hidden_size, eps=eps)
        self.expand = _linear(ColumnParallelLinear, hidden_size, ffn_size, std=init_std)
        self.contract = _linear(RowParallelLinear, ffn_size, hidden_size, std=residual_std)
        self.dropout = dropout

    def forward(self, x: Tensor) -> Tensor:
        y = F.gelu(self.expand(self.norm(x)), approximate="tanh")  # (B, S, F)
        y = self.contract(y)  # (B, S, D)
        return x + sharded_dropout(y, self.dropout, self.training, self.group if self.sequence_parallel else None)


class FinalNorm(nn.LayerNorm):
    """Layer norm of every token by itself: `(B, S, D)` to `(B, S, D)`."""

    sequence_flow = SHARDED


class Head(VocabularyParallelModule):
    """Scores every token of the vocabulary: `(B, S, D)` to `(B, S, V)`.

    Args:
        hidden_size: D.
        vocab_size: V.
        init_std: standard deviation of the initial weights.
        loss_chunk_tokens: see `score_vocabulary`.
    """

    sequence_flow = SequenceFlow(takes_shard=True)

    def __init__(
        self, hidden_size: int, vocab_size: int, *, init_std: float, loss_chunk_tokens: LossChunk = None
    ) -> None:
        super().__init__(vocab_size, hidden_size, init_std=init_std)
        self.loss_chunk_tokens = loss_chunk_tokens

    def forward(self, x: Tensor) -> Tensor | Logits:
        return score_vocabulary(self, x, self.loss_chunk_tokens)


@dataclass(frozen=True)
class TiedHead:
    """Scores every token by its embedding: `(B, S, D)` to `(B, S, V)`. The `forward_fn` of a tied `TokenEmbedding`.

    Attributes:
        loss_chunk_tokens: see `score_vocabulary`.
    """

    loss_chunk_tokens: LossChunk = None

    sequence_flow: ClassVar[SequenceFlow] = SequenceFlow(takes_shard=True)

    def __call__(self, embedding: TokenEmbedding, x: Tensor) -> Tensor | Logits:
        return score_vocabulary(embedding, x, self.loss_chunk_tokens)


def score_vocabulary(module: VocabularyParallelModule, x: Tensor, loss_chunk_tokens: LossChunk) -> Tensor | Logits:
    """Return the scores of every token of the vocabulary, `(B, S, V)`.

    Where tensor-parallel ranks share the vocabulary out, or the loss goes through the tokens in chunks, they are
    `Logits`, which are not computed before the loss asks.

    Args:
        module: has the `weight` `(V, D)`, of which a tensor-parallel rank has some rows.
        x: `(B, S, D)`, or this rank's part of the sequence.
        loss_chunk_tokens: how many tokens the loss computes the scores of at a time: None of all, `auto` of all where
            they are few.
    """
    parts = module.group if module.sequence_parallel else None
    num_tokens = x.shape[0] * x.shape[1] * (1 if parts is None else parts.size)
    chunk = loss_chunk_tokens
    if chunk == "auto":
        # The largest part, so that all ranks decide alike.
        tp = 1 if module.group is None else module.group.size
        chunk = plan_chunk_tokens(num_tokens, -(-module.vocab_size // tp))
    if module.group is None and chunk is None:
        return F.linear(x, module.weight)
    return Logits(
        x,
        module.weight,
        module.group,
        sequence_parallel=module.sequence_parallel,
        vocab_size=module.vocab_size,
        chunk_tokens=chunk,
    )


def build_gpt2(config: GPTConfig, *, loss_chunk_tokens: LossChunk = None) -> list[LayerSpec]:
    """Return GPT-2 as layer specs: token and position embedding, two halves for each block, final norm, head.

    Args:
        config: the sizes.
        loss_chunk_tokens: see `score_vocabulary`.

    Raises:
        ConfigError: if the vocabulary's size is not known yet.

    Example:
        >>> specs = build_gpt2(GPTConfig(preset="tiny", vocab_size=512, num_layers=1))
        >>> [spec.type_name for spec in specs]
        ['TokenEmbedding', 'PositionEmbedding', 'AttentionHalf', 'MLPHalf', 'FinalNorm', 'TokenEmbedding']
    """
    if config.vocab_size == "auto":
        raise ConfigError(
            "model.vocab_size=auto: the size is the tokenizer's, and none has been read yet; give a number, "
            "or call config.with_vocab_size(tokenizer's size)"
        )
    width, eps, std = config.hidden_size, config.layer_norm_eps, config.init_std
    # Two residual additions a block: their sum keeps its size at any depth.
    residual_std = std / math.sqrt(2 * config.num_layers)
    common = {"dropout": config.dropout, "eps": eps, "init_std": std, "residual_std": residual_std}

    heads = {} if config.num_kv_heads is None else {"num_kv_heads": config.num_kv_heads}

    embedding = (config.vocab_size, width)
    specs: list[LayerSpec] = [
        TiedLayerSpec("embed", TokenEmbedding, *embedding, init_std=std)
        if config.tied_embedding
        else LayerSpec(TokenEmbedding, *embedding, init_std=std, name="embed"),
        LayerSpec(
            PositionEmbedding,
            config.max_positions,
            width,
            dropout=config.dropout,
            init_std=std,
            name="position",
        ),
    ]
    for block in range(config.num_layers):
        specs += [
            LayerSpec(AttentionHalf, width, config.num_heads, **heads, **common, name=f"blocks.{block}.attention"),
            LayerSpec(MLPHalf, width, config.ffn_size, **common, name=f"blocks.{block}.mlp"),
        ]
    specs.append(LayerSpec(FinalNorm, width, eps=eps, name="final_norm"))
    specs.append(
        TiedLayerSpec("embed", TokenEmbedding, *embedding, init_std=std, forward_fn=TiedHead(loss_chunk_tokens))
        if config.tied_embedding
        else LayerSpec(Head, width, config.vocab_size, init_std=std, loss_chunk_tokens=loss_chunk_tokens, name="head")
    )
    return specs


LinearLayer = TypeVar("LinearLayer", bound=nn.Linear)


def _linear(kind: Callable[..., LinearLayer], *args: Any, std: float, **kwargs: Any) -> LinearLayer:
    # Without nn.Linear's own initial weights, which would be drawn only to be replaced.
    with torch.device("meta"):
        linear = kind(*args, **kwargs)
    linear.to_empty(device=torch.get_default_device())
    nn.init.normal_(linear.weight, std=std)
    nn.init.zeros_(linear.bias)
    return linear
