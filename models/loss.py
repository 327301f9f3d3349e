"""What a language model is trained on."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

IGNORED_LABEL = -100


def language_model_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the mean cross-entropy in fp32, a scalar in nats per token.

    Args:
        logits: `(B, S, V)`, any floating type.
        labels: `(B, S)` int64, the next token of each; -100 is left out of the mean.
    """
    return F.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), ignore_index=IGNORED_LABEL)
