"""Windows of the tokens of all documents, one after the other, as a map-style dataset."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from pipekit.data.megatron import TokenReader, TokenSlice
from pipekit.data.samples.counts import SampleCounts
from pipekit.data.samples.loss_mask import IGNORED_LABEL, load_loss_mask
from pipekit.errors import DataError


class TokenDataset(Dataset[tuple[Any, Tensor]]):
    """The windows of `sequence_length` tokens of a slice of a token file; the labels are the tokens one place further.

    Windows stand one after the other, so that every token but the last few is an input exactly once. A dataset of any
    size takes no memory, and is sent to another process as its path. With a document mask it takes 8 bytes for each
    document.

    Args:
        token_slice: the documents.
        sequence_length: S.
        document_mask: whether inputs are pairs of token ids and positions, which restart at every document; the last
            token of a document then has no label.
        has_loss_mask: whether a loss mask is beside the token file.

    Raises:
        DataError: if the file is broken or holds not even one window.
    """

    def __init__(
        self,
        token_slice: TokenSlice,
        sequence_length: int,
        *,
        document_mask: bool = False,
        has_loss_mask: bool = False,
    ) -> None:
        self.token_slice = token_slice
        self.sequence_length = sequence_length
        self.document_mask = document_mask
        self._tokens = TokenReader(token_slice)
        self._mask = load_loss_mask(token_slice) if has_loss_mask else None
        self._bounds = token_slice.load_bounds() if document_mask else None
        if len(self) < 1:
            raise DataError(
                f"{token_slice.path} holds {self._tokens.num_tokens} tokens, and one sample of "
                f"train.sequence_length={sequence_length} needs {sequence_length + 1}; "
                "lower train.sequence_length or give more text"
            )

    def __len__(self) -> int:
        return (self._tokens.num_tokens - 1) // self.sequence_length

    @property
    def counts(self) -> SampleCounts:
        """Numbers of tokens that are trained on, padded or cut off."""
        places = len(self) * self.sequence_length
        return SampleCounts(num_samples=len(self), num_places=places, num_documents=self.token_slice.num_documents)

    def __getitem__(self, index: int) -> tuple[Any, Tensor]:
        """Return `(inputs (S,), labels (S,))` of window `index`, both int64.

        With a document mask the inputs are a pair of the token ids and the positions; labels that do not count are
        -100.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        start = int(index) * self.sequence_length
        stop = start + self.sequence_length
        window = torch.from_numpy(self._tokens.read(start, self.sequence_length + 1))
        inputs, labels = window[:-1], window[1:]
        if self._mask is not None:
            is_learned = torch.from_numpy(self._mask[start + 1 : stop + 1].astype(np.bool_))
            labels = labels.masked_fill(~is_learned, IGNORED_LABEL)
        if self._bounds is None:
            return inputs, labels
        first, last = np.searchsorted(self._bounds, (start, stop), "right")
        begins = self._bounds[first:last] - start  # of documents that begin in the window, and of the next
        positions = torch.arange(self.sequence_length)
        labels = labels.clone()
        for begin in np.unique(begins).tolist():
            if begin > 0:
                labels[begin - 1] = IGNORED_LABEL
            positions[begin:] = torch.arange(self.sequence_length - begin)
        return (inputs, positions), labels

    def __reduce__(self) -> tuple[Any, ...]:
        # An open file cannot be sent.
        rebuild = partial(type(self), document_mask=self.document_mask, has_loss_mask=self._mask is not None)
        return rebuild, (self.token_slice, self.sequence_length)
