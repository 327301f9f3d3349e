"""The feed-forward half of a transformer block.

Tensor-parallel ranks share out its width, and what is between layers along the sequence.

Shapes: B sequences, S tokens, D hidden size, F feed-forward size.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from pipekit.models.transformer.linear import build_linear
from pipekit.tensor_parallel import (
    SHARDED,
    ColumnParallelLinear,
    RowParallelLinear,
    TensorParallelModule,
    sharded_dropout,
)

Activation = Literal["gelu", "gelu_tanh"]

_ACTIVATIONS: dict[Activation, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
}


class MLP(TensorParallelModule):
    """`dropout(mlp(norm(x)))`: `(B, S, D)` to `(B, S, D)` through a width of F.

    Args:
        hidden_size: D.
        ffn_size: F.
        activation: function between the two linear layers.
        dropout: probability of zeroing an output.
        eps: of the norm.
        init_std: standard deviation of the initial weights.
        residual_std: that of the second linear layer.
    """

    sequence_flow = SHARDED

    def __init__(
        self,
        hidden_size: int,
        ffn_size: int,
        *,
        activation: Activation,
        dropout: float,
        eps: float,
        init_std: float,
        residual_std: float,
    ) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(hidden_size, eps=eps)
        self.expand = build_linear(ColumnParallelLinear, hidden_size, ffn_size, std=init_std)
        self.contract = build_linear(RowParallelLinear, ffn_size, hidden_size, std=residual_std)
        self.activation = activation
        self.dropout = dropout

    def forward(self, x: Tensor) -> Tensor:
        y = _ACTIVATIONS[self.activation](self.expand(self.norm(x)))  # (B, S, F)
        y = self.contract(y)  # (B, S, D)
        return sharded_dropout(y, self.dropout, self.training, self.group if self.sequence_parallel else None)


class MLPHalf(MLP):
    """`x + dropout(mlp(norm(x)))`: the second half of a block, `(B, S, D)` to `(B, S, D)`."""

    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


class FinalNorm(nn.LayerNorm):
    """Layer norm of every token by itself: `(B, S, D)` to `(B, S, D)`."""

    sequence_flow = SHARDED
