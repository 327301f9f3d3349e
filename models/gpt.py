"""GPT-2 as a list of layer specs.

The attention half and the MLP half of a block are layers of their own, so that a partition can cut a block in
two. Each layer takes one tensor and returns one.

Shapes: B sequences, S tokens, D hidden size, H heads, E head size (D = H * E), F feed-forward size, V vocabulary size,
P positions.

Source: Radford et al. 2019, "Language Models are Unsupervised Multitask Learners"; layer norm before each half, learned
positions, tanh-approximated GELU, residual projections initialised smaller with depth.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from pipekit.config import GPTConfig
from pipekit.errors import ConfigError
from pipekit.specs import LayerSpec, TiedLayerSpec


class TokenEmbedding(nn.Module):
    """Looks token ids up: `(B, S)` int64 to `(B, S, D)`.

    Its `weight` `(V, D)` is the head's too, where they are tied.
    """

    def __init__(self, vocab_size: int, hidden_size: int, *, init_std: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, hidden_size))
        nn.init.normal_(self.weight, std=init_std)

    def forward(self, token_ids: Tensor) -> Tensor:
        return F.embedding(token_ids, self.weight)  # (B, S, D)


class PositionEmbedding(nn.Module):
    """Adds a learned vector for each position, then drops out: `(B, S, D)` to `(B, S, D)`.

    Its `weight` is `(P, D)`. The forward raises a ConfigError for a sequence of more than P tokens.
    """

    def __init__(self, max_positions: int, hidden_size: int, *, dropout: float, init_std: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(max_positions, hidden_size))
        self.dropout = dropout
        nn.init.normal_(self.weight, std=init_std)

    def forward(self, x: Tensor) -> Tensor:
        num_tokens, max_positions = x.shape[1], self.weight.shape[0]
        if num_tokens > max_positions:
            raise ConfigError(
                f"a sequence of {num_tokens} tokens is longer than model.max_positions={max_positions}; "
                "shorten it, or train a model with more positions"
            )
        x = x + self.weight[:num_tokens]  # (B, S, D) + (S, D)
        return F.dropout(x, self.dropout, self.training)


class AttentionHalf(nn.Module):
    """`x + attention(norm(x))`: causal self-attention with H heads, `(B, S, D)` to `(B, S, D)`."""

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        *,
        dropout: float,
        eps: float,
        init_std: float,
        residual_std: float,
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm = nn.LayerNorm(hidden_size, eps=eps)
        self.qkv = _linear(hidden_size, 3 * hidden_size, std=init_std)
        self.projection = _linear(hidden_size, hidden_size, std=residual_std)
        self.dropout = dropout

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(self.norm(x))  # (B, S, 3D)
        q, k, v = rearrange(qkv, "b s (three h e) -> three b h s e", three=3, h=self.num_heads)
        dropout = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)  # (B, H, S, E)
        y = self.projection(rearrange(y, "b h s e -> b s (h e)"))  # (B, S, D)
        return x + F.dropout(y, self.dropout, self.training)


class MLPHalf(nn.Module):
    """`x + mlp(norm(x))`: `(B, S, D)` to `(B, S, D)` through a width of F."""

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
        self.expand = _linear(hidden_size, ffn_size, std=init_std)
        self.contract = _linear(ffn_size, hidden_size, std=residual_std)
        self.dropout = dropout

    def forward(self, x: Tensor) -> Tensor:
        y = F.gelu(self.expand(self.norm(x)), approximate="tanh")  # (B, S, F)
        y = self.contract(y)  # (B, S, D)
        return x + F.dropout(y, self.dropout, self.training)


class Head(nn.Module):
    """Scores every token of the vocabulary: `(B, S, D)` to `(B, S, V)`."""

    def __init__(self, hidden_size: int, vocab_size: int, *, init_std: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, hidden_size))
        nn.init.normal_(self.weight, std=init_std)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)  # (B, S, V)


def tied_head(embedding: TokenEmbedding, x: Tensor) -> Tensor:
    """Score every token by its embedding: `(B, S, D)` to `(B, S, V)`."""
    return F.linear(x, embedding.weight)


def build_gpt2(config: GPTConfig) -> list[LayerSpec]:
    """Return GPT-2 as layer specs: token and position embedding, two halves for each block, final norm, head.

    Raises:
        ConfigError: if the vocabulary's size is not known yet.

    Example:
        >>> specs = build_gpt2(GPTConfig(preset="tiny", vocab_size=512, num_layers=1))
        >>> [spec.type_name for spec in specs]
        ['TokenEmbedding', 'PositionEmbedding', 'AttentionHalf', 'MLPHalf', 'LayerNorm', 'TokenEmbedding']
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
            LayerSpec(AttentionHalf, width, config.num_heads, **common, name=f"blocks.{block}.attention"),
            LayerSpec(MLPHalf, width, config.ffn_size, **common, name=f"blocks.{block}.mlp"),
        ]
    specs.append(LayerSpec(nn.LayerNorm, width, eps=eps, name="final_norm"))
    specs.append(
        TiedLayerSpec("embed", TokenEmbedding, *embedding, init_std=std, forward_fn=tied_head)
        if config.tied_embedding
        else LayerSpec(Head, width, config.vocab_size, init_std=std, name="head")
    )
    return specs


def _linear(in_features: int, out_features: int, *, std: float) -> nn.Linear:
    # Without nn.Linear's own initial weights, which would be drawn only to be replaced.
    linear = nn.Linear(in_features, out_features, device="meta").to_empty(device=torch.get_default_device())
    nn.init.normal_(linear.weight, std=std)
    nn.init.zeros_(linear.bias)
    return linear
