"""One micro-batch as a model is given it: shapes and types, without values."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from pipekit.models.transformer import language_model_loss


@dataclass(frozen=True)
class Example:
    """Example inputs and labels of one micro-batch.

    Attributes:
        inputs: nested tensors, of which shapes and types count alone; on torch's meta device they take no memory.
        labels: likewise.
        loss_fn: called as `loss_fn(outputs, labels)` behind the last layer; None where it cannot be told before a
            trial is built, or the last layer returns the loss.
    """

    inputs: Any
    labels: Any = None
    loss_fn: Callable[[Any, Any], Any] | None = None


def language_model_example(micro_batch_size: int, sequence_length: int, *, has_positions: bool = False) -> Example:
    """Return token ids `(B, S)`, beside them positions if asked for, as many labels, and their cross-entropy."""
    tokens = torch.empty(micro_batch_size, sequence_length, dtype=torch.int64, device="meta")
    return Example((tokens, tokens) if has_positions else tokens, tokens, language_model_loss)
