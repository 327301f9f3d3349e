"""Heads, separate or tied to the embedding, and the loss of their logits.

Shapes: B sequences, S tokens, D hidden size, V vocabulary size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor

from pipekit.layers.specs import LayerSpec, TiedLayerSpec
from pipekit.models.family import LossChunk
from pipekit.models.transformer.documents import Hidden, take_positions
from pipekit.models.transformer.embedding import TokenEmbedding
from pipekit.tensor_parallel import (
    Logits,
    SequenceFlow,
    VocabularyParallelModule,
    cap_softly,
    chunk_limit_bytes,
    plan_chunk_tokens,
)


class Head(VocabularyParallelModule):
    """Head with separate weights: logits by `score_vocabulary`, `(B, S, D)` to `(B, S, V)`."""

    sequence_flow = SequenceFlow(takes_shard=True)
    supports_cache = True
    takes_documents = True

    def __init__(
        self,
        hidden_size: int,
        vocab_size: int,
        *,
        init_std: float,
        loss_chunk_tokens: LossChunk = None,
        soft_cap: float | None = None,
    ) -> None:
        super().__init__(vocab_size, hidden_size, init_std=init_std)
        self.loss_chunk_tokens, self.soft_cap = loss_chunk_tokens, soft_cap

    def forward(self, x: Hidden) -> Tensor | Logits:
        return score_vocabulary(self, x, self.loss_chunk_tokens, soft_cap=self.soft_cap)


@dataclass(frozen=True)
class TiedHead:
    """Head tied to the embedding: logits by `score_vocabulary`, as the `forward_fn` of a tied `TokenEmbedding`."""

    loss_chunk_tokens: LossChunk
    soft_cap: float | None = None
    sequence_flow: ClassVar[SequenceFlow] = SequenceFlow(takes_shard=True)
    supports_cache: ClassVar = True
    takes_documents: ClassVar[bool] = True

    def __call__(self, embedding: TokenEmbedding, x: Hidden) -> Tensor | Logits:
        return score_vocabulary(embedding, x, self.loss_chunk_tokens, soft_cap=self.soft_cap)


def score_vocabulary(
    module: VocabularyParallelModule, x: Hidden, loss_chunk_tokens: LossChunk, *, soft_cap: float | None = None
) -> Tensor | Logits:
    """Logits of every token of the vocabulary, `(B, S, V)`.

    If the vocabulary is sharded over tensor-parallel ranks, or the loss processes tokens in chunks, the result is
    `Logits`, which are computed only in the loss.

    Args:
        module: module with the `weight` `(V, D)`, of which a tensor-parallel rank has some rows.
        x: `(B, S, D)`, or this rank's shard of the sequence; positions that come with it are dropped.
        loss_chunk_tokens: number of tokens per chunk of the loss: None for all at once, `auto` for all at once if they
            are few.
        soft_cap: limit that the logits approach; None for no limit.
    """
    x, _ = take_positions(x)
    parts = module.group if module.sequence_parallel else None
    chunk = loss_chunk_tokens
    if chunk == "auto":
        num_tokens = x.shape[0] * x.shape[1] * (1 if parts is None else parts.size)
        tp = 1 if module.group is None else module.group.size
        # The largest part, so that all ranks decide alike.
        limit_bytes = chunk_limit_bytes(module.weight.dtype)
        chunk = plan_chunk_tokens(num_tokens, -(-module.vocab_size // tp), limit_bytes=limit_bytes)
    if module.group is None and chunk is None:
        return cap_softly(F.linear(x, module.weight), soft_cap)
    return Logits(
        x,
        module.weight,
        module.group,
        sequence_parallel=module.sequence_parallel,
        vocab_size=module.vocab_size,
        chunk_tokens=chunk,
        soft_cap=soft_cap,
    )


def embedding_and_head(
    vocab_size: int,
    hidden_size: int,
    loss_chunk_tokens: LossChunk,
    *,
    tied: bool,
    scale: float | None = None,
    dropout: float = 0.0,
    soft_cap: float | None = None,
    init_std: float,
) -> tuple[LayerSpec, LayerSpec]:
    """Specs of a model's first layer, `embed`, and of its head, which is the same module if tied.

    `scale` and `dropout` belong to the embedding, `soft_cap` to the logits.
    """
    sizes = (vocab_size, hidden_size)
    options: dict[str, Any] = {"init_std": init_std, **({"dropout": dropout} if dropout else {})}
    options |= {} if scale is None else {"scale": scale}
    if tied:
        scores = TiedHead(loss_chunk_tokens, soft_cap)
        head = TiedLayerSpec("embed", TokenEmbedding, *sizes, **options, forward_fn=scores)
        return TiedLayerSpec("embed", TokenEmbedding, *sizes, **options), head
    return LayerSpec(TokenEmbedding, *sizes, **options, name="embed"), LayerSpec(
        Head,
        hidden_size,
        vocab_size,
        init_std=init_std,
        loss_chunk_tokens=loss_chunk_tokens,
        **({"soft_cap": soft_cap} if soft_cap else {}),
        name="head",
    )


def language_model_loss(outputs: Tensor | Logits, labels: Tensor) -> Tensor:
    """Mean cross-entropy of the next token in fp32, a scalar in nats per token.

    Args:
        outputs: the logits `(B, S, V)`, any floating type; or `Logits`, if they are sharded or computed in chunks.
        labels: `(B, S)` int64, the next token of each token; -100 is left out of the mean.
    """
    if isinstance(outputs, Logits):
        return outputs.cross_entropy(labels)
    return F.cross_entropy(outputs.float().flatten(0, 1), labels.flatten())
