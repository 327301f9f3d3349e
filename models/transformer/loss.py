"""Loss of a language model: cross-entropy of the next token."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from pipekit.tensor_parallel import Logits

IGNORED_LABEL = -100


def language_model_loss(outputs: Tensor | Logits, labels: Tensor) -> Tensor:
    """Return the mean cross-entropy in fp32, a scalar in nats per token.

    Args:
        outputs: the logits `(B, S, V)`, any floating type; or what stands for them where they are in parts or computed
            by the chunk.
        labels: `(B, S)` int64, the next token of each; -100 is left out of the mean.
    """
    if isinstance(outputs, Logits):
        return outputs.cross_entropy(labels, ignored_label=IGNORED_LABEL)
    return F.cross_entropy(outputs.float().flatten(0, 1), labels.flatten(), ignore_index=IGNORED_LABEL)
