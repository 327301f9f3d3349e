"""The loss of a language model."""

from __future__ import annotations

import math

import torch

from pipekit.models.transformer import language_model_loss


def test_it_is_the_mean_negative_log_probability_of_the_labels() -> None:
    logits = torch.randn(3, 5, 7, generator=torch.Generator().manual_seed(0))
    labels = torch.randint(7, (3, 5), generator=torch.Generator().manual_seed(1))
    expected = 0.0
    for row in range(3):
        for position in range(5):
            scores = logits[row, position].tolist()
            expected += math.log(sum(map(math.exp, scores))) - scores[int(labels[row, position])]
    assert abs(float(language_model_loss(logits, labels)) - expected / 15) < 1e-6


def test_ignored_labels_leave_the_mean() -> None:
    logits, labels = torch.randn(2, 4, 7), torch.randint(7, (2, 4))
    masked = labels.clone()
    masked[:, 2:] = -100
    expected = language_model_loss(logits[:, :2], labels[:, :2])
    torch.testing.assert_close(language_model_loss(logits, masked), expected)


def test_half_precision_logits_are_summed_in_fp32() -> None:
    logits = (torch.randn(2, 4, 5000) * 3).bfloat16()
    labels = torch.randint(5000, (2, 4))
    loss = language_model_loss(logits, labels)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), language_model_loss(logits.double(), labels).double(), atol=1e-5, rtol=0)


def test_equal_scores_lose_the_logarithm_of_the_vocabulary() -> None:
    loss = language_model_loss(torch.zeros(1, 3, 50257), torch.zeros(1, 3, dtype=torch.int64))
    assert abs(float(loss) - math.log(50257)) < 1e-5
