"""Windows of the tokens of all documents."""

from __future__ import annotations

import os
import pickle
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from pipekit.data.megatron import IndexedTokensWriter, TokenSlice, take_documents
from pipekit.data.order import SampleOrder
from pipekit.data.samples import TokenDataset
from pipekit.data.samples.loss_mask import mask_path
from pipekit.errors import DataError


def write_counting_tokens(path: Path, num_tokens: int, vocab_size: int = 1000) -> TokenSlice:
    with IndexedTokensWriter(path, vocab_size=vocab_size) as writer:
        writer.write(np.arange(num_tokens, dtype=np.int64))
        writer.end_document()
    return take_documents(path)


@pytest.mark.parametrize(("num_tokens", "num_samples"), [(5, 1), (8, 1), (9, 2), (12, 2), (13, 3)])
def test_windows_follow_each_other_and_labels_are_one_further(
    tmp_path: Path, num_tokens: int, num_samples: int
) -> None:
    dataset = TokenDataset(write_counting_tokens(tmp_path / "train.bin", num_tokens), sequence_length=4)
    assert len(dataset) == num_samples
    for index in range(num_samples):
        inputs, labels = dataset[index]
        assert inputs.tolist() == list(range(4 * index, 4 * index + 4))
        assert labels.tolist() == list(range(4 * index + 1, 4 * index + 5))
        assert inputs.dtype == labels.dtype == torch.int64
    with pytest.raises(IndexError):
        dataset[num_samples]


def test_wide_tokens_of_some_documents_are_not_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "train.bin"
    with IndexedTokensWriter(path, vocab_size=200_000) as writer:
        for token_ids in ([1, 2], [199_999, 65_536, 7], [3, 4]):
            writer.write(np.array(token_ids, dtype=np.int64))
            writer.end_document()
    dataset = TokenDataset(take_documents(path, 1, 1), 2)
    assert len(dataset) == 1, "one document of three"
    assert dataset[0][0].tolist() == [199_999, 65_536]


def test_a_file_that_is_cut_off_while_it_is_read_is_told_of(tmp_path: Path) -> None:
    dataset = TokenDataset(write_counting_tokens(tmp_path / "train.bin", 100), sequence_length=4)
    os.truncate(tmp_path / "train.bin", 100)
    assert dataset[11][1].tolist() == [45, 46, 47, 48]
    with pytest.raises(DataError, match=r"train.bin: has become shorter while it was read"):
        dataset[12]


def resident_mib() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def test_a_terabyte_of_tokens_takes_no_memory(tmp_path: Path) -> None:
    path, num_sequences, per_sequence = tmp_path / "train.bin", 500, 10**9
    with path.open("wb") as stream:
        stream.truncate(2 * num_sequences * per_sequence)
    with path.with_suffix(".idx").open("wb") as index:
        index.write(struct.pack("<9sQBQQ", b"MMIDIDX\0\0", 1, 8, num_sequences, num_sequences + 1))
        index.write(np.full(num_sequences, per_sequence, "<i4").tobytes())
        index.write((2 * per_sequence * np.arange(num_sequences, dtype="<i8")).tobytes())
        index.write(np.arange(num_sequences + 1, dtype="<i8").tobytes())
    dataset = TokenDataset(take_documents(path), sequence_length=2048)
    order = SampleOrder(len(dataset), seed=1)
    before_mib = resident_mib()
    for index in order.indices(10**8, 5000).tolist():
        dataset[index]
    assert resident_mib() - before_mib < 4


def test_a_pickled_dataset_is_small_and_equal(tmp_path: Path) -> None:
    dataset = TokenDataset(write_counting_tokens(tmp_path / "train.bin", 50_000, 50_000), sequence_length=8)
    pickled = pickle.dumps(dataset)
    assert len(pickled) < 1000
    assert torch.equal(pickle.loads(pickled)[100][0], dataset[100][0])


def test_less_than_one_window_is_refused(tmp_path: Path) -> None:
    tokens = write_counting_tokens(tmp_path / "train.bin", 4)
    with pytest.raises(DataError, match=r"holds 4 tokens, .*sequence_length=4 needs 5"):
        TokenDataset(tokens, sequence_length=4)


DOCUMENTS = [[1, 2, 3], [4], [], [5, 6, 7, 8, 9, 10], [11, 12, 13]]


def write_documents(path: Path, mask: list[int] | None = None) -> TokenSlice:
    with IndexedTokensWriter(path, vocab_size=100) as writer:
        for document in DOCUMENTS:
            writer.write(np.array(document, dtype=np.int64))
            writer.end_document()
    if mask is not None:
        mask_path(path).write_bytes(bytes(mask))
    return take_documents(path)


def test_positions_restart_and_no_label_is_of_another_document(tmp_path: Path) -> None:
    dataset = TokenDataset(write_documents(tmp_path / "train.bin"), 4, document_mask=True)
    found = [
        ([part.tolist() for part in inputs], labels.tolist()) for inputs, labels in map(dataset.__getitem__, range(3))
    ]
    assert found == [
        ([[1, 2, 3, 4], [0, 1, 2, 0]], [2, 3, -100, -100]),
        # The document goes on in the next window, where its positions begin anew.
        ([[5, 6, 7, 8], [0, 1, 2, 3]], [6, 7, 8, 9]),
        ([[9, 10, 11, 12], [0, 1, 0, 1]], [10, -100, 12, 13]),
    ]
    again = pickle.loads(pickle.dumps(dataset))
    assert torch.equal(again[2][0][1], dataset[2][0][1])


def test_labels_that_the_loss_mask_leaves_out_do_not_count(tmp_path: Path) -> None:
    mask = [0, 1, 0, 1, 1, 0, 0, 0, 1, 1, 0, 1, 1]
    whole = write_documents(tmp_path / "train.bin", mask)
    dataset = TokenDataset(whole, 4, has_loss_mask=True)
    assert [dataset[index][1].tolist() for index in range(3)] == [
        [2, -100, 4, 5],
        [-100, -100, -100, 9],
        [10, -100, 12, 13],
    ]
    some = TokenDataset(take_documents(whole.path, 3, 2), 4, has_loss_mask=True)
    assert some[0][1].tolist() == [-100, -100, -100, 9], "the mask of a slice begins where the slice does"


@pytest.mark.parametrize(
    ("mask", "message"), [(None, "no such file"), ([1, 1], "2 bytes, and train.bin has 13 tokens")]
)
def test_a_missing_mask_and_that_of_another_file_are_refused(
    tmp_path: Path, mask: list[int] | None, message: str
) -> None:
    with pytest.raises(DataError, match=message):
        TokenDataset(write_documents(tmp_path / "train.bin", mask), 4, has_loss_mask=True)
