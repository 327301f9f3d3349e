"""Lazy logits: the output of a head, computed in chunks so that no rank holds the logits of a whole micro-batch."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pipekit.tensor_parallel.collectives import SEQUENCE_DIM
from pipekit.tensor_parallel.cross_entropy import IGNORED_LABEL, cap_softly, vocabulary_parallel_cross_entropy
from pipekit.tensor_parallel.group import TensorGroup
from pipekit.tensor_parallel.head_loss import chunked_head_loss
from pipekit.tensor_parallel.layers import column_parallel_linear
from pipekit.tensor_parallel.shards import Shard


@dataclass(eq=False, repr=False)
class Logits:
    """Lazy logits `(B, S, V)`, which are not computed yet.

    The loss (`cross_entropy`) computes them a chunk at a time; `whole()` computes all of them.

    Args:
        hidden: `(B, S, D)`; with `sequence_parallel` this rank's shard of the sequence, `(B, S / tp, D)`.
        weight: the head's weight, `(V / tp, D)`: this rank's rows, by `Shard(0, (V,), rank, tp)`.
        group: the tensor-parallel peers; None if the weight is whole, `(V, D)`.
        sequence_parallel: True if `hidden` is a shard of the sequence.
        vocab_size: V.
        chunk_tokens: number of tokens per chunk of the loss, see `plan_chunk_tokens`; None for all at once.
        soft_cap: limit that the logits approach, see `cap_softly`; None for no limit.

    Example:
        >>> logits = Logits(torch.ones(2, 3, 4), torch.ones(8, 4), None, vocab_size=8, chunk_tokens=4)
        >>> logits.shape, logits.whole().shape
        (torch.Size([2, 3, 8]), torch.Size([2, 3, 8]))
        >>> f"{logits.cross_entropy(torch.zeros(2, 3, dtype=torch.int64)):.4f} is ln 8"
        '2.0794 is ln 8'
    """

    hidden: Tensor
    weight: Tensor
    group: TensorGroup | None
    _: KW_ONLY
    sequence_parallel: bool = False
    vocab_size: int
    chunk_tokens: int | None = None
    soft_cap: float | None = None

    def __post_init__(self) -> None:
        self.sequence_parallel = self.sequence_parallel and self.group is not None

    @property
    def shape(self) -> torch.Size:
        """`(B, S, V)`, of the whole sequence and vocabulary."""
        batch, num_tokens, _ = self.hidden.shape
        num_shards = self.group.size if self.group is not None and self.sequence_parallel else 1
        return torch.Size((batch, num_tokens * num_shards, self.vocab_size))

    def cross_entropy(self, labels: Tensor, *, ignored_label: int = IGNORED_LABEL) -> Tensor:
        """Return the mean cross-entropy in fp32, a scalar in nats per token, equal on all tensor ranks.

        The labels `(B, S)` int64 are the next token of each token of the whole sequence; the mean leaves out
        `ignored_label`.

        Raises:
            DataError: if there is not one label for each token, or, on the CPU, if a label is not in the vocabulary.
        """
        if self.chunk_tokens is not None:
            return chunked_head_loss(
                self.hidden,
                self.weight,
                labels,
                self.group,
                sequence_parallel=self.sequence_parallel,
                vocab_size=self.vocab_size,
                chunk_tokens=self.chunk_tokens,
                ignored_label=ignored_label,
                soft_cap=self.soft_cap,
            )
        logits = column_parallel_linear(
            self.hidden, self.weight, None, self.group, sequence_parallel=self.sequence_parallel
        )
        return vocabulary_parallel_cross_entropy(
            cap_softly(logits, self.soft_cap),
            labels,
            self.group,
            vocab_size=self.vocab_size,
            ignored_label=ignored_label,
        )

    @torch.no_grad()
    def whole(self) -> Tensor:
        """Return the logits `(B, S, V)` as a tensor on every tensor rank; all tensor ranks call this together.

        It is for evaluation, and has no gradient.
        """
        if self.group is None:
            return cap_softly(F.linear(self.hidden, self.weight), self.soft_cap)
        hidden = self.group.all_gather(self.hidden, SEQUENCE_DIM) if self.sequence_parallel else self.hidden
        own = cap_softly(F.linear(hidden, self.weight), self.soft_cap)
        shard = Shard(own.ndim - 1, (self.vocab_size,), self.group.rank, self.group.size)
        lengths = [shard.shape_of(rank, own.shape)[-1] for rank in range(shard.size)]
        # Ranks gather tensors of one shape, and the shards of a vocabulary may differ by one.
        padded = F.pad(own, (0, max(lengths) - own.shape[-1]))
        return shard.join(self.group.all_gather(padded, shard.dim).chunk(shard.size, shard.dim))


def whole_outputs(outputs: Any) -> Any:
    """Return the outputs of a model with tensors in place of `Logits`, also in tuples, lists and dicts.

    Example:
        >>> logits = Logits(torch.ones(1, 2, 4), torch.ones(8, 4), None, vocab_size=8)
        >>> whole_outputs({"logits": logits, "step": 3})["logits"].shape
        torch.Size([1, 2, 8])
    """
    if isinstance(outputs, Logits):
        return outputs.whole()
    if type(outputs) is tuple or type(outputs) is list:
        return type(outputs)(whole_outputs(output) for output in outputs)
    if type(outputs) is dict:
        return {key: whole_outputs(output) for key, output in outputs.items()}
    return outputs
