"""Cross-entropy over a sharded vocabulary: each rank has some of the logits.

For each token, a rank needs three numbers from the others: the largest logit, the sum of exponentials, and the label's
logit from the rank that has it.

Source: Shoeybi et al. 2019, "Megatron-LM", section 3 (the fused loss of the output embedding).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from pipekit.errors import DataError
from pipekit.tensor_parallel.group import TensorGroup
from pipekit.tensor_parallel.shards import Shard

IGNORED_LABEL = -100


def cap_softly(scores: Tensor, cap: float | None) -> Tensor:
    """Soft cap of scores, `cap * tanh(scores / cap)`; None leaves the scores unchanged.

    Source: Bello et al. 2016, "Neural Combinatorial Optimization with Reinforcement Learning".

    Example:
        >>> cap_softly(torch.tensor([0.0, 1000.0]), 30.0).tolist()
        [0.0, 30.0]
    """
    return scores if cap is None else torch.tanh(scores / cap) * cap


def vocabulary_parallel_cross_entropy(
    logits: Tensor, labels: Tensor, group: TensorGroup | None, *, vocab_size: int, ignored_label: int = IGNORED_LABEL
) -> Tensor:
    """Mean cross-entropy over a sharded vocabulary in fp32, a scalar in nats per token, equal on all tensor ranks.

    Logits are never gathered, and only one fp32 copy of this rank's logits exists at a time. As in torch, the mean over
    no tokens is nan.

    Args:
        logits: `(B, S, V / tp)`, any floating type: this rank's shard, by `Shard(0, (V,), rank, tp)`; `(B, S, V)` where
            `group` is None.
        labels: `(B, S)` int64, the next token of each token; `ignored_label` is left out of the mean.

    Raises:
        DataError: if there is not one label for each token, or, on the CPU, if a label is not in the vocabulary.

    Example:
        >>> logits, labels = torch.zeros(1, 3, 8), torch.tensor([[5, 7, -100]])
        >>> f"{vocabulary_parallel_cross_entropy(logits, labels, None, vocab_size=8):.4f} of ln 8"
        '2.0794 of ln 8'
    """
    targets = Targets.of(labels, group, num_tokens=logits[..., 0].numel(), vocab_size=vocab_size, ignored=ignored_label)
    if group is None:
        return F.cross_entropy(logits.float().flatten(0, -2), labels.flatten(), ignore_index=ignored_label)
    loss: Tensor = _CrossEntropy.apply(logits, targets, group)  # type: ignore[no-untyped-call]
    return loss


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Targets, group: TensorGroup) -> Tensor:
        sums, scores = join_sums(*sum_up(logits.flatten(0, -2), targets), group)
        ctx.save_for_backward(logits, sums)
        ctx.targets = targets
        return mean_loss(sums, scores, targets)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        logits, sums = ctx.saved_tensors
        return logits_gradient(logits.flatten(0, -2), sums, ctx.targets, grad).view_as(logits), None, None


@dataclass(frozen=True)
class Targets:
    """Labels of T tokens, for a rank that has some columns of the logits.

    Attributes:
        columns: `(T, 1)` int64, the label's column, or 0 if it is ignored or on another rank.
        is_here: `(T, 1)` bool, True if the label's column is on this rank.
        counts: `(T, 1)` bool, True if the token is in the mean.
        num_counted: scalar int64, the number of tokens in the mean, in the whole micro-batch.
    """

    columns: Tensor
    is_here: Tensor
    counts: Tensor
    num_counted: Tensor

    @classmethod
    def of(
        cls, labels: Tensor, group: TensorGroup | None, *, num_tokens: int, vocab_size: int, ignored: int
    ) -> Targets:
        """Find T labels, in a tensor of any shape, among this rank's columns.

        Raises:
            DataError: if T is not `num_tokens`, or, on the CPU, if a label is not in the vocabulary.
        """
        if labels.numel() != num_tokens:
            raise DataError(
                f"labels of shape {tuple(labels.shape)} are for {labels.numel()} tokens, and the model has scored "
                f"{num_tokens}; give one label for each token of the whole sequence"
            )
        labels = labels.reshape(-1, 1)
        counts = labels != ignored
        # Elsewhere this would wait for the device.
        if labels.device.type == "cpu":
            _check(labels[counts], vocab_size)
        rank, size = (0, 1) if group is None else (group.rank, group.size)
        (own,) = Shard(0, (vocab_size,), rank, size).slices
        is_here = counts & (labels >= own.start) & (labels < own.stop)
        return cls((labels - own.start).masked_fill(~is_here, 0), is_here, counts, counts.sum())

    def narrow(self, start: int, length: int) -> Targets:
        """Return the targets of some of the tokens; the mean is still over all tokens."""
        each = (self.columns, self.is_here, self.counts)
        columns, is_here, counts = (tensor.narrow(0, start, length) for tensor in each)
        return Targets(columns, is_here, counts, self.num_counted)


def _check(labels: Tensor, vocab_size: int) -> None:
    wrong = labels[(labels < 0) | (labels >= vocab_size)]
    if wrong.numel():
        raise DataError(
            f"label {int(wrong[0])} is not in a vocabulary of {vocab_size}; set model.vocab_size to the "
            "tokenizer's size, or tokenize the data again"
        )


def sum_up(logits: Tensor, targets: Targets) -> tuple[Tensor, Tensor]:
    """Largest logit, sum of exponentials and label's logit of each token, in fp32 (fp64 for fp64 logits).

    Returns:
        `(T, 2)`, the largest logit and the sum of the exponentials of all logits minus the largest; and `(T, 1)`, the
        label's logit, or 0 if it is on another rank. There is no log-sum-exp, because with large logits it would have
        few digits left for small differences.
    """
    dtype = torch.promote_types(logits.dtype, torch.float32)
    largest = logits.amax(-1, keepdim=True).to(dtype)
    # All may be -inf, where this rank's shard of the vocabulary is masked out.
    reference = largest.masked_fill(largest == -torch.inf, 0)
    total = torch.sub(logits, reference).exp_().sum(-1, keepdim=True)
    scores = logits.gather(1, targets.columns).to(dtype).masked_fill_(~targets.is_here, 0)
    return torch.cat([largest, total], -1), scores


def join_sums(sums: Tensor, scores: Tensor, group: TensorGroup | None) -> tuple[Tensor, Tensor]:
    """Combine the ranks' results of `sum_up` into those of the whole vocabulary, in one collective."""
    if group is None:
        return sums, scores
    # A rank's three numbers of a token stay side by side: (T, tp, 3).
    largest, totals, scores = group.all_gather(torch.cat([sums, scores], -1).unsqueeze(1), 1).unbind(-1)
    reference = largest.amax(-1, keepdim=True)
    total = (totals * (largest - reference).exp_()).sum(-1, keepdim=True)
    return torch.cat([reference, total], -1), scores.sum(-1, keepdim=True)


def mean_loss(sums: Tensor, scores: Tensor, targets: Targets) -> Tensor:
    """Return the mean loss of the tokens that count, in fp32, from the results of `join_sums`."""
    largest, total = sums.chunk(2, -1)
    losses = (largest - scores) + total.log()
    return losses.masked_fill_(~targets.counts, 0).sum().div_(targets.num_counted).float()


def logits_gradient(logits: Tensor, sums: Tensor, targets: Targets, grad: Tensor) -> Tensor:
    """Return the gradient of a rank's logits `(T, V / tp)`, in their type, from the gradient of the mean loss.

    The sums `(T, 2)` are those of the whole vocabulary, from `join_sums`.
    """
    largest, total = sums.chunk(2, -1)
    weights = (grad.to(sums.dtype) / targets.num_counted).expand_as(total).masked_fill(~targets.counts, 0)
    gradient = torch.sub(logits, largest).exp_().mul_(weights / total)
    gradient.scatter_add_(1, targets.columns, -weights * targets.is_here)
    return gradient.to(logits.dtype)
