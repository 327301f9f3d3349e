"""Counts of samples, padding and truncation."""

from __future__ import annotations

from pydantic import BaseModel


class SampleCounts(BaseModel, frozen=True):
    """Numbers of a data set's tokens that are trained on, padded or cut off.

    Attributes:
        num_samples: samples of an epoch.
        num_places: tokens that all samples have room for.
        num_padding: places that are filled up.
        num_documents: documents with at least one token to predict.
        num_truncated: documents that are longer than a sample, and lose the rest.
        num_lost_tokens: tokens that they lose.
        num_left_out: documents without a token to learn, which are in no sample.
    """

    num_samples: int
    num_places: int
    num_padding: int = 0
    num_documents: int
    num_truncated: int = 0
    num_lost_tokens: int = 0
    num_left_out: int = 0

    def __str__(self) -> str:
        """One line for a person.

        Example:
            >>> counts = SampleCounts(num_samples=3, num_places=48, num_padding=12, num_documents=9, num_truncated=1,
            ...     num_lost_tokens=5)
            >>> str(counts)
            '3 samples of 9 documents, 25.0% padding; 1 document is cut off, which loses 5 tokens'
        """
        text = f"{_count(self.num_samples, 'sample')} of {_count(self.num_documents, 'document')}"
        text += f", {self.num_padding / max(1, self.num_places):.1%} padding"
        if self.num_truncated:
            verb, loses = ("is", "loses") if self.num_truncated == 1 else ("are", "lose")
            text += f"; {_count(self.num_truncated, 'document')} {verb} cut off, which {loses} "
            text += _count(self.num_lost_tokens, "token")
        if self.num_left_out:
            is_out = "has nothing to learn, and is" if self.num_left_out == 1 else "have nothing to learn, and are"
            text += f"; {_count(self.num_left_out, 'document')} {is_out} left out"
        return text


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
