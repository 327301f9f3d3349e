"""Scores of spans of tokens, however they are batched."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from pipekit.errors import NumbersError
from pipekit.evaluation.scoring import Span, score_spans, token_scores

VOCABULARY = 7
WEIGHTS = torch.randn(VOCABULARY, VOCABULARY, generator=torch.Generator().manual_seed(0))


def logits_of(tokens: Tensor) -> Tensor:
    """Logits `(B, S, V)` of a model that sees all that stands before, in any order."""
    return WEIGHTS[tokens].cumsum(1)


class Model:
    """Notes the shapes of its batches, and spoils what stands behind each row."""

    def __init__(self) -> None:
        self.shapes: list[tuple[int, ...]] = []

    def __call__(self, inputs: Tensor, lengths: Sequence[int], targets: Tensor) -> tuple[Tensor, Tensor]:
        self.shapes.append(tuple(targets.shape))
        logits = logits_of(inputs)
        for row, length in enumerate(lengths):
            logits[row, length:] = math.nan
        return token_scores(logits, targets)


def by_hand(span: Span) -> tuple[float, bool]:
    total, is_greedy = 0.0, True
    for place in range(len(span.tokens) - span.num_scored, len(span.tokens)):
        probabilities = logits_of(torch.tensor([span.tokens[:place]]))[0, -1].double().softmax(0)
        total += math.log(probabilities[span.tokens[place]])
        is_greedy &= int(probabilities.argmax()) == span.tokens[place]
    return total, is_greedy


SPANS = [
    Span((1, 2, 3, 4), 2),
    Span((5, 6), 1),
    Span((1, 2, 3, 5), 1),
    Span((1, 2, 3, 4), 3),
    Span((0, 0, 0, 0, 0, 6), 5),
    *(Span((3, 3, token), 1) for token in range(VOCABULARY)),
]


@pytest.mark.parametrize("batch_size", [1, 2, 100])
def test_each_span_is_scored_as_alone(batch_size: int) -> None:
    found = score_spans(SPANS, Model(), batch_size=batch_size)
    for span, score in zip(SPANS, found, strict=True):
        log_likelihood, is_greedy = by_hand(span)
        assert score.log_likelihood == pytest.approx(log_likelihood, abs=1e-5)
        assert score.is_greedy is is_greedy
    assert sum(score.is_greedy for score in found[-VOCABULARY:]) == 1


def test_spans_that_differ_in_the_last_token_share_a_row_and_the_longest_come_first() -> None:
    model = Model()
    done: list[int] = []
    score_spans(SPANS, model, batch_size=2, on_progress=done.append)
    assert model.shapes == [(2, 5, 3), (2, 2, VOCABULARY)]
    assert done == [4, len(SPANS)]


def test_a_model_that_has_diverged_is_told_of() -> None:
    def nowhere(inputs: Tensor, lengths: Sequence[int], targets: Tensor) -> tuple[Tensor, Tensor]:
        return token_scores(torch.full((*inputs.shape, VOCABULARY), math.nan), targets)

    with pytest.raises(NumbersError, match=r"the model's logits are nan"):
        score_spans(SPANS, nowhere, batch_size=4)
