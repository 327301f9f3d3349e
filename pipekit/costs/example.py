"""Example micro-batches: the shapes and types of a model's inputs and labels, without values."""

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
        inputs: nested tensors, of which only shapes and types matter; on torch's meta device they take no memory.
        labels: nested tensors, likewise.
        loss_fn: called as `loss_fn(outputs, labels)` after the last layer; None if it is not known before the trial is
            built, or if the last layer returns the loss.
    """

    inputs: Any
    labels: Any = None
    loss_fn: Callable[[Any, Any], Any] | None = None


def language_model_example(micro_batch_size: int, sequence_length: int, *, has_positions: bool = False) -> Example:
    """Example of a language model: token ids `(B, S)`, positions if asked for, labels `(B, S)`, and cross-entropy."""
    tokens = torch.empty(micro_batch_size, sequence_length, dtype=torch.int64, device="meta")
    return Example((tokens, tokens) if has_positions else tokens, tokens, language_model_loss)
