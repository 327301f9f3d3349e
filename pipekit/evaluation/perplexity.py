"""Perplexity and bits per byte of a language model on a text, as a stream of tokens in windows."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import numpy.typing as npt

from pipekit.data.tokenizer import TextTokenizer
from pipekit.errors import DataError
from pipekit.evaluation.scoring import Span, TokenScorer, score_spans

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
        num_tokens: tokens that were scored; those that end documents are among them.
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


def measure_perplexity(
    tokens: npt.NDArray[Any],
    score: TokenScorer,
    *,
    name: str,
    tokenizer: TextTokenizer,
    window: int,
    stride: int | None = None,
    batch_size: int,
    on_progress: Callable[[float], None] | None = None,
) -> Perplexity:
    """Return the perplexity of a text, given as its tokens `(N,)`.

    Args:
        tokens: of all documents, one after the other, each with the token that ends it.
        score: the model.
        name: of the text.
        tokenizer: of the tokens, for the bytes of the text.
        window: tokens that the model sees at once.
        stride: see `plan_windows`; that of windows that do not overlap unless given.
        batch_size: windows of a forward.
        on_progress: called with the fraction that is done.

    Raises:
        DataError: if there are fewer than two tokens.
        NumbersError: if the model's logits are not numbers.
    """
    if len(tokens) < 2:
        raise DataError(f"{name}: holds {len(tokens)} tokens, and two at least are needed; give more text")
    total = 0.0
    windows = plan_windows(len(tokens), window=window, stride=stride or window)
    while planned := list(islice(windows, batch_size * _CALL_BATCHES)):
        spans = [Span(tuple(tokens[begin:end].tolist()), num_scored) for begin, end, num_scored in planned]
        total += math.fsum(-found.log_likelihood for found in score_spans(spans, score, batch_size=batch_size))
        if on_progress is not None:
            on_progress(planned[-1][1] / len(tokens))
    num_scored = len(tokens) - 1
    return Perplexity(name, total / num_scored, num_scored, count_bytes(tokens, tokenizer))


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
