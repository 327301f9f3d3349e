"""Whole documents in samples, packed or one by one, and filled up with padding, as a map-style dataset."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Dataset

from pipekit.data.megatron import TokenReader, TokenSlice
from pipekit.data.samples.counts import SampleCounts
from pipekit.data.samples.loss_mask import IGNORED_LABEL, load_loss_mask
from pipekit.errors import DataError

Indices = npt.NDArray[np.int64]


class PackedDataset(Dataset[tuple[Any, Tensor]]):
    """Samples of `sequence_length` tokens of whole documents; the label of a token is the next of its document.

    The last token of a document is a label alone. What a sample has left over is filled up with token 0, which has no
    label. A document that is longer than a sample is cut into pieces; a conversation is truncated to the first. The
    dataset takes 24 bytes of memory for each document.

    Args:
        token_slice: the documents.
        sequence_length: S.
        packs: whether samples hold several pieces, by best-fit-decreasing; otherwise each holds one.
        document_mask: whether inputs are pairs of token ids and positions, which restart at every document.
        has_loss_mask: whether a loss mask is beside the token file; longer documents are then truncated.

    Raises:
        DataError: if the file is broken, or no document has anything to learn.

    Source: Ding et al. 2024, "Fewer Truncations Improve Language Modeling".
    """

    def __init__(
        self, token_slice: TokenSlice, sequence_length: int, *, packs: bool, document_mask: bool, has_loss_mask: bool
    ) -> None:
        self.token_slice, self.sequence_length = token_slice, sequence_length
        self.document_mask, self.has_loss_mask = document_mask, has_loss_mask
        self._load()
        bounds = token_slice.load_bounds()
        begins, sizes = bounds[:-1], np.maximum(bounds[1:] - bounds[:-1] - 1, 0)  # inputs of each document
        kept = np.minimum(sizes, sequence_length) if has_loss_mask else sizes
        is_cut = kept < sizes
        pieces, lengths = _cut(begins, kept, sequence_length)
        is_learned = self._learns(pieces, lengths)
        self._begins, self._lengths = pieces[is_learned], lengths[is_learned]
        if not len(self._begins):
            raise DataError(
                f"{token_slice.path} holds {token_slice.num_documents} documents, and none has a token to learn within "
                f"train.sequence_length={sequence_length}; raise it, or give more text"
            )
        # Where each sample begins among the pieces; None where each piece is one.
        self._samples: Indices | None = None
        if packs:
            order, self._samples = _pack_best_fit(self._lengths, sequence_length)
            self._begins, self._lengths = self._begins[order], self._lengths[order]
        places = len(self) * sequence_length
        is_left_out = ~_any_of(is_learned, begins, pieces)
        self.counts = SampleCounts(
            num_samples=len(self),
            num_places=places,
            num_padding=places - int(self._lengths.sum()),
            num_documents=int((~is_left_out).sum()),
            num_truncated=int((is_cut & ~is_left_out).sum()),
            num_lost_tokens=int((sizes - kept)[~is_left_out].sum()),
            num_left_out=int(is_left_out.sum()),
        )

    def _load(self) -> None:
        self._tokens = TokenReader(self.token_slice)
        self._mask = load_loss_mask(self.token_slice) if self.has_loss_mask else None

    def _learns(self, begins: Indices, lengths: Indices) -> npt.NDArray[np.bool_]:
        """True for each piece with a label that counts."""
        if self._mask is None:
            return lengths > 0
        labels = (self._mask[begin + 1 : begin + 1 + length] for begin, length in zip(begins, lengths, strict=True))
        return np.array([bool(part.any()) for part in labels], dtype=np.bool_)

    def __len__(self) -> int:
        return len(self._begins) if self._samples is None else len(self._samples) - 1

    def __getitem__(self, index: int) -> tuple[Any, Tensor]:
        """Return `(inputs (S,), labels (S,))` of sample `index`, both int64.

        With a document mask the inputs are a pair of the token ids and the positions, and the padding is a document of
        its own; labels that do not count are -100.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        pieces = range(index, index + 1)
        if self._samples is not None:
            pieces = range(int(self._samples[index]), int(self._samples[index + 1]))
        inputs = torch.zeros(self.sequence_length, dtype=torch.int64)
        labels = torch.full_like(inputs, IGNORED_LABEL)
        positions = torch.zeros_like(inputs)
        place = 0
        for piece in pieces:
            begin, length = int(self._begins[piece]), int(self._lengths[piece])
            tokens = torch.from_numpy(self._tokens.read(begin, length + 1))
            here = slice(place, place + length)
            inputs[here], labels[here] = tokens[:-1], tokens[1:]
            if self._mask is not None:
                is_learned = torch.from_numpy(self._mask[begin + 1 : begin + length + 1].astype(np.bool_))
                labels[here] = labels[here].masked_fill(~is_learned, IGNORED_LABEL)
            positions[here] = torch.arange(length)
            place += length
        positions[place:] = torch.arange(self.sequence_length - place)
        return ((inputs, positions) if self.document_mask else inputs), labels

    def __getstate__(self) -> dict[str, Any]:
        # An open file cannot be sent.
        return {name: value for name, value in vars(self).items() if name not in ("_tokens", "_mask")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._load()


def _cut(begins: Indices, sizes: Indices, length: int) -> tuple[Indices, Indices]:
    """Cut documents into pieces of `length` inputs and a shorter last one; return where each begins, and its inputs."""
    numbers = -(-sizes // length)
    firsts = np.repeat(np.cumsum(numbers) - numbers, numbers)
    offsets = (np.arange(len(firsts)) - firsts) * length
    return np.repeat(begins, numbers) + offsets, np.minimum(np.repeat(sizes, numbers) - offsets, length)


def _any_of(is_learned: npt.NDArray[np.bool_], begins: Indices, pieces: Indices) -> npt.NDArray[np.bool_]:
    """True for each document of which a piece is learned; pieces are told by where they begin."""
    found = np.zeros(len(begins), dtype=np.bool_)
    # Of several documents that begin at one place, all but the last are empty.
    found[np.searchsorted(begins, pieces[is_learned], "right") - 1] = True
    return found


def _pack_best_fit(lengths: Indices, capacity: int) -> tuple[Indices, Indices]:
    """Pack pieces into samples: the longest first, each into the fullest sample that has room for it.

    Returns:
        The pieces in the order of the samples, and where each sample begins among them, and the last one ends.

    Example:
        >>> order, samples = _pack_best_fit(np.array([3, 8, 5, 2]), 8)
        >>> [order[begin:end].tolist() for begin, end in zip(samples, samples[1:])]
        [[1], [2, 0], [3]]
    """
    room_of: list[list[int]] = [[] for _ in range(capacity + 1)]  # samples by the places that they have left
    has_room = 0  # bit r is set where some sample has r places left
    sample_of = np.empty(len(lengths), dtype=np.int64)
    num_samples = 0
    for piece in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[piece])
        fitting = has_room >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            sample = room_of[room].pop()
            if not room_of[room]:
                has_room &= ~(1 << room)
        else:
            room, sample = capacity, num_samples
            num_samples += 1
        sample_of[piece] = sample
        if left := room - length:
            room_of[left].append(sample)
            has_room |= 1 << left
    by_length = np.argsort(-lengths, kind="stable")
    order = by_length[np.argsort(sample_of[by_length], kind="stable")]
    return order, np.searchsorted(sample_of[order], np.arange(num_samples + 1))
