"""Token and position embeddings.

Shapes: B sequences, S tokens, D hidden size, V vocabulary size, P positions.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipekit.errors import ConfigError
from pipekit.models.transformer.cache import KeyValueCache
from pipekit.models.transformer.documents import Hidden, passing_positions, take_positions
from pipekit.tensor_parallel import (
    SHARDED,
    SequenceFlow,
    TensorParallelModule,
    VocabularyParallelEmbedding,
    sharded_dropout,
)


class TokenEmbedding(VocabularyParallelEmbedding):
    """Token embedding, multiplied by `scale`, with dropout: `(B, S)` int64 to `(B, S, D)`.

    The head shares the `weight` `(V, D)` if they are tied. V need not be a multiple of the tensor-parallel degree.
    """

    sequence_flow = SequenceFlow(returns_shard=True)
    supports_cache = True
    takes_documents = True

    def __init__(
        self, vocab_size: int, hidden_size: int, *, scale: float | None = None, dropout: float = 0.0, init_std: float
    ) -> None:
        super().__init__(vocab_size, hidden_size, init_std=init_std)
        self.scale, self.dropout = scale, dropout

    @passing_positions
    def forward(self, token_ids: Tensor) -> Tensor:
        x = super().forward(token_ids)
        if self.scale is not None:
            # As a number of the type of the weights, and on no device, so that none is waited for.
            x = x * torch.tensor(self.scale, dtype=x.dtype, device="cpu")
        return sharded_dropout(x, self.dropout, self.training, self.group if self.sequence_parallel else None)


class PositionEmbedding(TensorParallelModule):
    """Learned position embedding, added to the input, with dropout: `(B, S, D)` to `(B, S, D)`.

    Its `weight` is `(P, D)`. The forward raises a ConfigError for a sequence of more than P tokens.
    """

    sequence_flow = SHARDED
    supports_cache = True
    cache: KeyValueCache | None = None
    takes_documents = True

    def __init__(self, max_positions: int, hidden_size: int, *, dropout: float, init_std: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(max_positions, hidden_size))
        self.dropout = dropout
        nn.init.normal_(self.weight, std=init_std)

    def forward(self, x: Hidden) -> Hidden:
        x, positions = take_positions(x)
        parts = self.group if self.sequence_parallel else None
        length, max_positions = x.shape[1], self.weight.shape[0]
        num_tokens, first = (length, 0) if parts is None else (length * parts.size, length * parts.rank)
        if self.cache is not None:
            first, num_tokens = self.cache.num_slots, self.cache.num_slots + length
        if num_tokens > max_positions:
            raise ConfigError(
                f"a sequence of {num_tokens} tokens is longer than model.max_positions={max_positions}; "
                "shorten it, or train a model with more positions"
            )
        if positions is not None:
            x = x + F.embedding(positions[:, first : first + length], self.weight)
        elif self.cache is not None and self.cache.padding is not None:
            x = x + self.weight[self.cache.positions()]  # (B, S, D) + (B, S, D)
        else:
            x = x + self.weight[first : first + length]  # (B, S, D) + (S, D)
        y = sharded_dropout(x, self.dropout, self.training, parts)
        return y if positions is None else (y, positions)
