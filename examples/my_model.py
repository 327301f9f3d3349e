"""A model of one's own as a list of layer specs: a causal MLP-mixer on text.

It has no attention: a token reads those before it through one learned weight for each pair of positions.

Shapes: B sequences, S tokens, D hidden size, F feed-forward size, V vocabulary size.

Source: Tolstikhin et al. 2021, "MLP-Mixer: An all-MLP Architecture for Vision", with the mixing made causal.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipekit import Config, LayerSpec, TiedLayerSpec
from pipekit.tensor_parallel import ColumnParallelLinear, RowParallelLinear


class TokenEmbedding(nn.Module):
    """Looks token ids up: `(B, S)` int64 to `(B, S, D)`."""

    def __init__(self, vocab_size: int, hidden_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(0.02 * torch.randn(vocab_size, hidden_size))

    def forward(self, token_ids: Tensor) -> Tensor:
        return F.embedding(token_ids, self.weight)  # (B, S, D)


class TokenMixer(nn.Module):
    """`x + mix(norm(x))`: a weighted sum of the tokens so far, `(B, S, D)` to `(B, S, D)`."""

    def __init__(self, hidden_size: int, sequence_length: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(hidden_size)
        self.weight = nn.Parameter(0.02 * torch.randn(sequence_length, sequence_length))

    def forward(self, x: Tensor) -> Tensor:
        num_tokens = x.shape[1]
        weight = self.weight[:num_tokens, :num_tokens].tril()  # (S, S): row t reads columns 0 to t
        return x + weight @ self.norm(x)


class ChannelMixer(nn.Module):
    """`x + mlp(norm(x))`: `(B, S, D)` to `(B, S, D)` through a width of F, which tensor-parallel ranks share out."""

    def __init__(self, hidden_size: int, ffn_size: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(hidden_size)
        self.expand = ColumnParallelLinear(hidden_size, ffn_size)
        self.contract = RowParallelLinear(ffn_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.contract(F.gelu(self.expand(self.norm(x))))


def score_tokens(embedding: TokenEmbedding, x: Tensor) -> Tensor:
    """Score every token by its embedding: `(B, S, D)` to `(B, S, V)`."""
    return F.linear(x, embedding.weight)


def build_layers(config: Config) -> list[LayerSpec]:
    """Return the model; `model.args` in the YAML file gives `hidden_size` and `num_blocks`."""
    args = config.model.args
    width, length = args["hidden_size"], config.train.sequence_length
    embedding = (TokenEmbedding, config.data.vocab_size, width)
    specs = [TiedLayerSpec("embed", *embedding)]
    for block in range(args["num_blocks"]):
        specs.append(LayerSpec(TokenMixer, width, length, name=f"blocks.{block}.tokens"))
        specs.append(LayerSpec(ChannelMixer, width, 4 * width, name=f"blocks.{block}.channels"))
    specs.append(LayerSpec(nn.LayerNorm, width, name="final_norm"))
    specs.append(TiedLayerSpec("embed", *embedding, forward_fn=score_tokens))
    return specs
