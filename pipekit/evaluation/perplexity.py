"""Perplexity and bits per byte of a language model on a text, as a stream of tokens in windows."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice, pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from pipekit.data.tokenizer import TextTokenizer
from pipekit.errors import DataError
from pipekit.evaluation.scoring import Span, TokenScorer, score_spans
from pipekit.evaluation.texts import Text

# Decoding takes several times the memory of its tokens.
_DECODED_TOKENS = 1 << 20
# Windows of a call, so that a text of any length takes no memory.
_CALL_BATCHES = 16


@dataclass(frozen=True)
class Perplexity:
    """Loss, perplexity and bits per byte of a language model on a text.

    Attributes:
        name: of the text.
        loss: mean negative log-likelihood of a token, in nats.
        num_tokens: tokens that were scored; those that end documents are among them, and of conversations only those
            that count in the loss.
        num_bytes: UTF-8 bytes of the text of these tokens; what ends a document has none.
    """

    name: str
    loss: float
    num_tokens: int
    num_bytes: int

    @property
    def perplexity(self) -> float:
        """Exponential of the loss; infinite where that is too large for a number.

        Example:
            >>> f"{Perplexity('text', loss=math.log(50), num_tokens=1, num_bytes=4).perplexity:.3f}"
            '50.000'
        """
        try:
            return math.exp(self.loss)
        except OverflowError:
            return math.inf

    @property
    def bits_per_byte(self) -> float:
        """Bits that the model needs for a byte of the text, which does not depend on the tokenizer.

        Example:
            >>> Perplexity("text", loss=math.log(16), num_tokens=10, num_bytes=40).bits_per_byte
            1.0
        """
        return self.loss * self.num_tokens / self.num_bytes / math.log(2) if self.num_bytes else math.inf

    def as_record(self) -> dict[str, Any]:
        """All of it by name, for JSON; a number that is not finite is None."""
        found = {**vars(self), "perplexity": self.perplexity, "bits_per_byte": self.bits_per_byte}
        return {name: None if value == math.inf else value for name, value in found.items()}


def plan_windows(num_tokens: int, *, window: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """Yield `(begin, end, num_scored)` of windows such that every token but the first is scored exactly once.

    Those are the tokens `begin` to `end - 1`, at most `window` inputs and the token after the last of them.

    Args:
        num_tokens: of the text.
        window: inputs of a forward.
        stride: tokens that each window but the first scores at most; those before them are context.

    Example:
        >>> list(plan_windows(10, window=4, stride=4))
        [(0, 5, 4), (4, 9, 4), (5, 10, 1)]
        >>> list(plan_windows(10, window=4, stride=2))
        [(0, 5, 4), (2, 7, 2), (4, 9, 2), (5, 10, 1)]
    """
    scored = 1
    while scored < num_tokens:
        end = min(scored + (window if scored == 1 else stride), num_tokens)
        yield max(0, end - window - 1), end, end - scored
        scored = end


def plan_spans(text: Text, *, window: int, stride: int) -> Iterator[tuple[int, Span]]:
    """Yield the spans of a text whose scored tokens together are its tokens, and the place in the text where each ends.

    Of conversations each is read by itself, and spans in which no token counts are left out.

    Args:
        text: to score.
        window: see `plan_windows`.
        stride: see `plan_windows`.
    """
    bounds = [0, len(text.tokens)] if text.conversations is None else text.conversations.tolist()
    for first, last in pairwise(bounds):
        for begin, end, num_scored in plan_windows(last - first, window=window, stride=stride):
            counts: tuple[bool, ...] | None = None
            if text.loss_mask is not None:
                counts = tuple(map(bool, text.loss_mask[first + end - num_scored : first + end].tolist()))
            if counts is None or any(counts):
                yield first + end, Span(tuple(text.tokens[first + begin : first + end].tolist()), num_scored, counts)


def measure_perplexity(
    text: Text,
    score: TokenScorer,
    *,
    tokenizer: TextTokenizer,
    window: int,
    stride: int | None = None,
    batch_size: int,
    on_progress: Callable[[float], None] | None = None,
) -> Perplexity:
    """Return the perplexity of a text; of conversations that of the tokens that count in the loss.

    Args:
        text: to score.
        score: the model.
        tokenizer: of the tokens, for the bytes of the text.
        window: tokens that the model sees at once.
        stride: see `plan_windows`; that of windows that do not overlap unless given.
        batch_size: windows of a forward.
        on_progress: called with the fraction that is done.

    Raises:
        DataError: if there is no token to score.
        NumbersError: if the model's logits are not numbers.
    """
    num_tokens = len(text.tokens)
    total, num_scored = 0.0, 0
    planned = plan_spans(text, window=window, stride=stride or window)
    while batch := list(islice(planned, batch_size * _CALL_BATCHES)):
        spans = [span for _, span in batch]
        total += math.fsum(-found.log_likelihood for found in score_spans(spans, score, batch_size=batch_size))
        num_scored += sum(span.num_scored if span.counts is None else sum(span.counts) for span in spans)
        if on_progress is not None:
            on_progress(batch[-1][0] / num_tokens)
    if not num_scored:
        if num_tokens < 2:
            raise DataError(f"{text.name}: holds {num_tokens} tokens, and two at least are needed; give more text")
        raise DataError(f"{text.name}: holds {num_tokens} tokens, of which none counts in the loss; give answers, too")
    return Perplexity(text.name, total / num_scored, num_scored, count_text_bytes(text, tokenizer))


def count_text_bytes(text: Text, tokenizer: TextTokenizer) -> int:
    """UTF-8 bytes of the text of the tokens that are scored; special tokens have none."""
    if text.conversations is None or text.loss_mask is None:
        return count_bytes(text.tokens, tokenizer)
    num_bytes = 0
    for first, last in pairwise(text.conversations.tolist()):
        counts = text.loss_mask[first:last].astype(np.int8)
        counts[:1] = 0  # is context alone
        # Where a run of tokens that count begins, and where it ends. What stands before decides how it is decoded.
        changes = np.flatnonzero(np.diff(counts, prepend=0, append=0)).tolist()
        lengths = [len(tokenizer.decode(text.tokens[first : first + place].tolist()).encode()) for place in changes]
        num_bytes += sum(lengths[1::2]) - sum(lengths[::2])
    return num_bytes


def count_bytes(tokens: npt.NDArray[Any], tokenizer: TextTokenizer) -> int:
    """UTF-8 bytes of the text of tokens `(N,)` without the first, which is context alone.

    Documents are decoded one by one; the token that ends them has no text. Of a document of more than a million tokens
    it is one piece after the other.
    """
    first = tokens[:1].tolist()
    num_bytes = -len(tokenizer.decode(first).encode())
    ends = np.flatnonzero(tokens == tokenizer.end_token_id)
    begin = 0
    for end in [*ends.tolist(), len(tokens)]:
        while begin < end:
            piece_end = min(end, begin + _DECODED_TOKENS)
            text = tokenizer.decode(tokens[begin:piece_end].tolist())
            # A character may come in several tokens.
            while text.endswith("�") and piece_end < end and piece_end < begin + _DECODED_TOKENS + 8:
                piece_end += 1
                text = tokenizer.decode(tokens[begin:piece_end].tolist())
            num_bytes += len(text.encode())
            begin = piece_end
        begin = end + 1
    return num_bytes
