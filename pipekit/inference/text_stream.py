"""Text of tokens that come one at a time: whole characters, until a stop string."""

from __future__ import annotations

from collections.abc import Sequence

from pipekit.data.tokenizer import TextTokenizer

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
_DECODED_TOKENS = 16


class TextStream:
    """Turns tokens that follow a prompt into text, piece by piece.

    A character of several bytes may come in several tokens, and is shown when it is whole. What may be the beginning of
    a stop string is held back until it is known to be none.

    Args:
        tokenizer: of the tokens.
        prompt: the tokens before.
        stop: strings before which the text ends, also where tokens contain parts of them; none of them is empty.

    Attributes:
        has_stopped: True once a stop string has come.
    """

    def __init__(self, tokenizer: TextTokenizer, prompt: Sequence[int], *, stop: Sequence[str] = ()) -> None:
        self.has_stopped = False
        self._tokenizer, self._stop = tokenizer, stop
        # Decoded along: a tokenizer may write a first token otherwise than one that follows another.
        self._tokens = list(prompt)[-_DECODED_TOKENS:]
        self._decoded = tokenizer.decode(self._tokens)
        self._held = ""

    def push(self, token: int) -> str:
        """Add a token, and return the text that can be shown now."""
        self._tokens.append(token)
        text = self._tokenizer.decode(self._tokens)
        is_whole = not text.endswith(_REPLACEMENT)
        text = text.rstrip(_REPLACEMENT)
        if len(text) > len(self._decoded):
            self._held += text[len(self._decoded) :]
            self._decoded = text
        if is_whole and len(self._tokens) > 2 * _DECODED_TOKENS:
            shorter = self._tokens[-_DECODED_TOKENS:]
            self._tokens, self._decoded = shorter, self._tokenizer.decode(shorter)
        if not self._stop:
            return self.finish()
        found = [place for stop in self._stop if (place := self._held.find(stop)) >= 0]
        if found:
            self.has_stopped = True
            piece, self._held = self._held[: min(found)], ""
            return piece
        num_held = max((_overlap(self._held, stop) for stop in self._stop), default=0)
        shown = len(self._held) - num_held
        piece, self._held = self._held[:shown], self._held[shown:]
        return piece

    def finish(self) -> str:
        """Return the text that was held back."""
        piece, self._held = self._held, ""
        return piece


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of a text with which a stop string begins."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if stop.startswith(text[-length:]):
            return length
    return 0
