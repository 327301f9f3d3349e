"""Whole documents in samples: packed, one by one, cut and truncated."""

from __future__ import annotations

import pickle
from itertools import chain, pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipekit.config import DataConfig
from pipekit.data.megatron import IndexedTokensWriter, TokenSlice, take_documents
from pipekit.data.samples import PackedDataset, build_samples
from pipekit.data.samples.loss_mask import mask_path
from pipekit.data.samples.packed import _pack_best_fit
from pipekit.errors import DataError

DOCUMENTS = [[1, 2, 3], [4], [5, 6, 7, 8, 9, 10, 11], [12, 13, 14], [15, 16]]


def write_documents(path: Path, masks: list[list[int]] | None = None) -> TokenSlice:
    with IndexedTokensWriter(path, vocab_size=100) as writer:
        for document in DOCUMENTS:
            writer.write(np.array(document, dtype=np.int64))
            writer.end_document()
    if masks is not None:
        mask_path(path).write_bytes(bytes(chain.from_iterable(masks)))
    return take_documents(path)


def pairs_of(dataset: PackedDataset) -> list[tuple[int, int]]:
    """Every input with its label, where it has one."""
    found = []
    for index in range(len(dataset)):
        inputs, labels = dataset[index]
        inputs = inputs[0] if dataset.document_mask else inputs
        found += [(int(token), int(label)) for token, label in zip(inputs, labels, strict=True) if label != -100]
    return found


@pytest.mark.parametrize("packs", [True, False])
def test_every_token_predicts_the_next_of_its_document_once(tmp_path: Path, packs: bool) -> None:
    tokens = write_documents(tmp_path / "train.bin")
    dataset = PackedDataset(tokens, 4, packs=packs, document_mask=False, has_loss_mask=False)
    assert sorted(pairs_of(dataset)) == sorted(pair for document in DOCUMENTS for pair in pairwise(document))
    assert len(dataset) == (3 if packs else 5)
    assert dataset.counts.num_padding == 4 * len(dataset) - 11
    assert dataset.counts.num_left_out == 1, "a document of one token predicts nothing"


def test_packed_documents_restart_their_positions_and_so_does_the_padding(tmp_path: Path) -> None:
    dataset = PackedDataset(
        write_documents(tmp_path / "train.bin"), 4, packs=True, document_mask=True, has_loss_mask=False
    )
    for index in range(len(dataset)):
        (tokens, positions), labels = dataset[index]
        for place in range(1, 4):
            follows = labels[place - 1] == tokens[place] and tokens[place] != 0
            goes_on = follows or tokens[place - 1] == 0
            assert positions[place] == (positions[place - 1] + 1 if goes_on else 0)
    assert torch.equal(pickle.loads(pickle.dumps(dataset))[1][0][1], dataset[1][0][1])


def test_conversations_are_truncated_and_counted(tmp_path: Path) -> None:
    masks = [[0, 1, 1], [1], [0, 0, 0, 1, 1, 1, 1], [0, 0, 0], [0, 1]]
    tokens = write_documents(tmp_path / "train.bin", masks)
    dataset = PackedDataset(tokens, 4, packs=False, document_mask=False, has_loss_mask=True)
    assert pairs_of(dataset) == [(1, 2), (2, 3), (7, 8), (8, 9), (15, 16)]
    assert dataset.counts.model_dump() == {
        "num_samples": 3,
        "num_places": 12,
        "num_padding": 5,
        "num_documents": 3,
        "num_truncated": 1,
        "num_lost_tokens": 2,
        "num_left_out": 2,
    }
    assert str(dataset.counts) == (
        "3 samples of 3 documents, 41.7% padding; 1 document is cut off, which loses 2 tokens; 2 documents have "
        "nothing to learn, and are left out"
    )


def test_what_is_learned_only_beyond_the_cut_is_left_out_and_not_truncated(
    tmp_path: Path,
) -> None:
    masks = [[0, 1, 1], [1], [0, 0, 0, 0, 0, 1, 1], [0, 0, 1], [0, 1]]
    tokens = write_documents(tmp_path / "train.bin", masks)
    counts = PackedDataset(tokens, 4, packs=False, document_mask=False, has_loss_mask=True).counts
    assert (counts.num_documents, counts.num_left_out) == (3, 2)
    assert (counts.num_truncated, counts.num_lost_tokens) == (0, 0)


def test_nothing_to_learn_is_refused(tmp_path: Path) -> None:
    tokens = write_documents(tmp_path / "train.bin", [[0] * len(document) for document in DOCUMENTS])
    with pytest.raises(DataError, match=r"holds 5 documents, and none has a token to learn within .*sequence_length=4"):
        PackedDataset(tokens, 4, packs=False, document_mask=False, has_loss_mask=True)


@pytest.mark.parametrize(
    ("packing", "document_mask", "has_loss_mask", "num_samples"),
    [(None, True, False, 3), (None, True, True, 3), (None, False, True, 4), ("none", True, False, 5)],
)
def test_null_packs_conversations_only_where_a_mask_keeps_them_apart(
    tmp_path: Path, packing: str | None, document_mask: bool, has_loss_mask: bool, num_samples: int
) -> None:
    tokens = write_documents(tmp_path / "train.bin", [[1] * len(document) for document in DOCUMENTS])
    config = DataConfig(packing=packing, document_mask=document_mask)
    assert len(build_samples(tokens, 4, config=config, has_loss_mask=has_loss_mask)) == num_samples


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(1, 12), min_size=1, max_size=40))
def test_best_fit_is_that_of_a_search_through_all_samples(lengths: list[int]) -> None:
    rooms: list[int] = []
    expected: list[list[int]] = []
    for piece in sorted(range(len(lengths)), key=lambda piece: -lengths[piece]):
        fitting = [sample for sample, room in enumerate(rooms) if room >= lengths[piece]]
        if fitting:
            sample = min(fitting, key=lambda sample: rooms[sample])
        else:
            sample = len(rooms)
            rooms.append(12)
            expected.append([])
        rooms[sample] -= lengths[piece]
        expected[sample].append(piece)
    order, samples = _pack_best_fit(np.array(lengths), 12)
    found = [order[begin:end] for begin, end in pairwise(samples)]
    assert sorted(np.concatenate(found)) == list(range(len(lengths)))
    # Of several samples with equal room, another may be chosen.
    contents = [sorted(lengths[piece] for piece in sample) for sample in found]
    assert sorted(map(sum, contents)) == sorted(12 - room for room in rooms)
