"""A transformer block whose attention and MLP read the same input.

Shapes: B sequences, S tokens, D hidden size, H heads, F feed-forward size.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from pipekit.models.transformer.attention import Attention
from pipekit.models.transformer.mlp import MLP, Activation
from pipekit.models.transformer.rotary import Rotary
from pipekit.tensor_parallel import SHARDED, TensorParallelModule


class ParallelBlock(TensorParallelModule):
    """`x + dropout(attention(norm(x))) + dropout(mlp(other_norm(x)))`: `(B, S, D)` to `(B, S, D)`.

    Args:
        hidden_size: D.
        num_heads: H.
        ffn_size: F.
        rotary: rotation of queries and keys; None where positions are added to the tokens.
        activation: function between the two linear layers of the MLP.
        dropout: probability of zeroing an attention weight, and an output.
        eps: of the norms.
        init_std: standard deviation of the initial weights.
        residual_std: that of the last projections of attention and MLP.

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
