"""Log-likelihoods of token spans under a language model: batches of similar length, one forward for equal inputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pipekit.errors import NumbersError

TokenScorer = Callable[[Tensor, Sequence[int], Tensor], tuple[Tensor, Tensor]]
"""Called with inputs `(B, S)`, padded on the right, the length of each, and targets `(B, S, K)`, K candidates for the
token after each input; returns `token_scores` of the model's logits. All tensors are on the CPU."""


@dataclass(frozen=True)
class Span:
    """Tokens whose last `num_scored` are scored, each after all that stand before it.

    The first token is never scored, so that `num_scored` is less than the number of tokens. `counts` says whether each
    scored token counts; without it, all do.
    """

    tokens: tuple[int, ...]
    num_scored: int
    counts: tuple[bool, ...] | None = None


@dataclass(frozen=True)
class Score:
    """Log-likelihood of a span's scored tokens, in nats, and whether greedy decoding would say them."""

    log_likelihood: float
    is_greedy: bool


def token_scores(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities of candidate tokens in fp32, and whether each is the likeliest token: both `(B, S, K)`.

    Args:
        logits: `(B, S, V)`, any floating type.
        targets: `(B, S, K)` int64, below V.

    Example:
        >>> token_scores(torch.tensor([[[0.0, 0.0, 9.0]]]), torch.tensor([[[2, 1]]]))[1].tolist()
        [[[True, False]]]
    """
    logits = logits.float()
    log_probabilities = logits.gather(-1, targets) - logits.logsumexp(-1, keepdim=True)
    return log_probabilities, targets == logits.argmax(-1, keepdim=True)


def score_spans(
    spans: Sequence[Span],
    score: TokenScorer,
    *,
    batch_size: int,
    on_progress: Callable[[int], None] | None = None,
) -> list[Score]:
    """Return the score of each span, in their order.

    Spans that differ in their last token alone, such as the answers of a multiple-choice question, share one row of a
    batch. The longest come first, so that a batch that does not fit into memory fails at once.

    Args:
        spans: what to score.
        score: the model.
        batch_size: rows of a batch at most.
        on_progress: called with the number of spans that are done.

    Raises:
        NumbersError: if the model's logits are not numbers.
    """
    rows: dict[tuple[int, ...], list[int]] = {}
    for index, span in enumerate(spans):
        rows.setdefault(span.tokens[:-1], []).append(index)
    ordered = sorted(rows, key=len, reverse=True)
    found: dict[int, Score] = {}
    for begin in range(0, len(ordered), batch_size):
        batch = ordered[begin : begin + batch_size]
        num_candidates = max(len(rows[inputs]) for inputs in batch)
        inputs = torch.zeros(len(batch), len(batch[0]), dtype=torch.int64)
        targets = torch.zeros(*inputs.shape, num_candidates, dtype=torch.int64)
        for row, tokens in enumerate(batch):
            inputs[row, : len(tokens)] = torch.tensor(tokens)
            targets[row, : len(tokens) - 1] = inputs[row, 1 : len(tokens), None]
            for candidate, index in enumerate(rows[tokens]):
                targets[row, len(tokens) - 1, candidate] = spans[index].tokens[-1]
        log_probabilities, are_likeliest = score(inputs, [len(tokens) for tokens in batch], targets)
        for row, tokens in enumerate(batch):
            for candidate, index in enumerate(rows[tokens]):
                span = spans[index]
                scored = torch.arange(len(tokens) - span.num_scored, len(tokens))
                if span.counts is not None:
                    scored = scored[torch.tensor(span.counts)]
                log_likelihood = float(log_probabilities[row, scored, candidate].double().sum())
                if log_likelihood != log_likelihood:
                    raise NumbersError(
                        "the model's logits are nan: its training diverged; evaluate an earlier checkpoint"
                    )
                found[index] = Score(log_likelihood, bool(are_likeliest[row, scored, candidate].all()))
        if on_progress is not None:
            on_progress(len(found))
    return [found[index] for index in range(len(spans))]
