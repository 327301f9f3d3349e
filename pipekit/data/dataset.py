"""Token windows as a map-style dataset."""

from __future__ import annotations

import torch
from torch.utils.data import Dataset

from pipekit.data.megatron import TokenReader, TokenSlice
from pipekit.errors import DataError


class TokenDataset(Dataset[tuple[torch.Tensor, torch.Tensor]]):
    """The windows of `sequence_length` tokens of a slice of a token file; the labels are the tokens one place further.

    Windows stand one after the other, so that every token but the last few is an input exactly once. A dataset of any
    size takes no memory, and is sent to another process as its path.

    Raises:
        DataError: if the file is broken or holds not even one window.
    """

    def __init__(self, token_slice: TokenSlice, sequence_length: int) -> None:
        self.token_slice = token_slice
        self.sequence_length = sequence_length
        self._tokens = TokenReader(token_slice)
        if len(self) < 1:
            raise DataError(
                f"{token_slice.path} holds {self._tokens.num_tokens} tokens, and one sample of "
                f"train.sequence_length={sequence_length} needs {sequence_length + 1}; "
                "lower train.sequence_length or give more text"
            )

    def __len__(self) -> int:
        return (self._tokens.num_tokens - 1) // self.sequence_length

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return `(inputs (S,), labels (S,))`, both int64, of window `index`."""
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        start = int(index) * self.sequence_length
        window = torch.from_numpy(self._tokens.read(start, self.sequence_length + 1))
        return window[:-1], window[1:]

    def __reduce__(self) -> tuple[type[TokenDataset], tuple[TokenSlice, int]]:
        # An open file cannot be sent.
        return type(self), (self.token_slice, self.sequence_length)
