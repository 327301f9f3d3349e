from __future__ import annotations

import contextlib
import struct
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from pipekit.data import megatron
from pipekit.data.megatron import IndexedTokens, IndexedTokensWriter, sample_checksum, take_documents, token_dtype
from pipekit.errors import DataError

DOCUMENTS = [[5, 6, 7], [300], [], [65535, 0]]


def write_documents(path: Path, documents: Sequence[Sequence[int]], vocab_size: int = 65_536) -> str:
    with IndexedTokensWriter(path, vocab_size=vocab_size) as writer:
        for document in documents:
            for part in np.array_split(np.array(document, dtype=np.int64), 2):
                writer.write(part)
            writer.end_document()
    return writer.fingerprint


def read_documents(path: Path) -> list[list[int]]:
    return [document.tolist() for document in IndexedTokens(path).documents()]


def list_files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_every_byte_is_as_the_format_says(tmp_path: Path) -> None:
    """Written out by hand from the format's description, so that Megatron reads what is written here."""
    write_documents(tmp_path / "a.bin", DOCUMENTS, vocab_size=65_536)
    assert (tmp_path / "a.bin").read_bytes() == struct.pack("<6i", 5, 6, 7, 300, 65535, 0)
    index = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, 4, 4, 5)
    index += struct.pack("<4i", 3, 1, 0, 2) + struct.pack("<4q", 0, 12, 16, 16) + struct.pack("<5q", 0, 1, 2, 3, 4)
    assert (tmp_path / "a.idx").read_bytes() == index
    assert list_files(tmp_path) == ["a.bin", "a.idx"]


@pytest.mark.parametrize(("vocab_size", "dtype", "code"), [(65_499, "uint16", 8), (65_500, "int32", 4)])
def test_the_type_is_that_which_megatron_chooses(tmp_path: Path, vocab_size: int, dtype: str, code: int) -> None:
    write_documents(tmp_path / "a.bin", [[0, vocab_size - 1]], vocab_size)
    assert token_dtype(vocab_size) == dtype
    assert IndexedTokens(tmp_path / "a.bin").tokens.dtype == np.dtype(dtype)
    assert (tmp_path / "a.idx").read_bytes()[17] == code
    assert read_documents(tmp_path / "a.bin") == [[0, vocab_size - 1]]


@pytest.mark.parametrize(
    ("code", "letter"), [(1, "B"), (2, "b"), (3, "h"), (4, "i"), (5, "q"), (8, "H")], ids=lambda value: str(value)
)
def test_every_type_of_whole_numbers_is_read(tmp_path: Path, code: int, letter: str) -> None:
    """Three sequences in two documents, as files of sentences have them."""
    size = struct.calcsize(letter)
    (tmp_path / "a.bin").write_bytes(struct.pack(f"<6{letter}", 1, 2, 3, 4, 5, 6))
    index = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, code, 3, 3)
    index += struct.pack("<3i", 2, 1, 3) + struct.pack("<3q", 0, 2 * size, 3 * size) + struct.pack("<3q", 0, 2, 3)
    (tmp_path / "a.idx").write_bytes(index)
    assert read_documents(tmp_path / "a") == [[1, 2, 3], [4, 5, 6]]


@pytest.mark.parametrize("documents", [[], [[]], [[], []], [[1], []], [[], [1]]])
def test_files_without_tokens_and_documents_without_any(tmp_path: Path, documents: list[list[int]]) -> None:
    write_documents(tmp_path / "a.bin", documents)
    assert read_documents(tmp_path / "a.bin") == documents


def test_long_files_are_read_and_written_in_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    documents = [list(range(length)) for length in (3, 0, 7, 1, 12, 4, 4)]
    write_documents(tmp_path / "whole.bin", documents)
    monkeypatch.setattr(megatron, "_CHUNK", 2)
    write_documents(tmp_path / "chunks.bin", documents)
    assert (tmp_path / "chunks.idx").read_bytes() == (tmp_path / "whole.idx").read_bytes()
    assert read_documents(tmp_path / "chunks.bin") == documents


def test_a_document_too_long_for_one_sequence_has_several(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(megatron, "_MAX_SEQUENCE_TOKENS", 5)
    documents = [list(range(5)), list(range(23)), [1]]
    write_documents(tmp_path / "a.bin", documents)
    file = IndexedTokens(tmp_path / "a.bin")
    assert file.num_documents == 3
    assert file.num_sequences > 6
    assert read_documents(tmp_path / "a.bin") == documents


def test_a_slice_holds_some_documents(tmp_path: Path) -> None:
    write_documents(tmp_path / "a.bin", DOCUMENTS)
    some = take_documents(tmp_path / "a.bin", 1, 3)
    assert some.load_tokens().tolist() == [300, 65535, 0]
    assert some.load_bounds().tolist() == [0, 1, 1, 3]
    assert (some.num_documents, some.num_tokens, some.num_file_bytes) == (3, 3, 24)
    assert take_documents(tmp_path / "a").load_bounds().tolist() == [0, 3, 4, 4, 6]


@pytest.mark.parametrize("documents", [[*DOCUMENTS, [1]][1:], DOCUMENTS[:3]])
def test_a_slice_of_a_file_that_has_changed_is_refused(tmp_path: Path, documents: list[list[int]]) -> None:
    write_documents(tmp_path / "a.bin", DOCUMENTS)
    last = take_documents(tmp_path / "a.bin", 3, 1)
    write_documents(tmp_path / "a.bin", documents)
    with pytest.raises(DataError, match=r"has changed since .*: documents 3 to 3 no longer have 2 tokens"):
        last.load_tokens()


def test_fingerprint_follows_the_tokens_alone(tmp_path: Path) -> None:
    one = write_documents(tmp_path / "1.bin", [[1, 2, 3, 4]])
    assert write_documents(tmp_path / "2.bin", [[1, 2, 3, 4]]) == one
    assert write_documents(tmp_path / "3.bin", [[1, 2, 4, 3]]) != one


def test_tokens_cannot_be_changed_through_the_map(tmp_path: Path) -> None:
    write_documents(tmp_path / "a.bin", DOCUMENTS)
    with pytest.raises(ValueError, match="read-only"):
        IndexedTokens(tmp_path / "a.bin").tokens[0] = 3


def test_writing_that_breaks_off_leaves_nothing(tmp_path: Path) -> None:
    with contextlib.suppress(KeyboardInterrupt), IndexedTokensWriter(tmp_path / "a.bin", vocab_size=9) as writer:
        writer.write(np.arange(5))
        raise KeyboardInterrupt
    assert list_files(tmp_path) == []


@pytest.mark.parametrize("name", ["a.bin", "a.idx"])
def test_a_missing_file_is_named(tmp_path: Path, name: str) -> None:
    write_documents(tmp_path / "a.bin", DOCUMENTS)
    (tmp_path / name).unlink()
    with pytest.raises(DataError, match=rf"{name}: cannot be read: No such file .*give both"):
        IndexedTokens(tmp_path / "a.bin")


@pytest.mark.parametrize(
    ("name", "change", "rule"),
    [
        ("a.bin", lambda data: data[:-1], "does not describe a.bin, which has 23 bytes"),
        ("a.bin", lambda data: data + data, "does not describe a.bin, which has 48 bytes"),
        ("a.idx", lambda data: data[:20], "not an index of Megatron's format"),
        ("a.idx", lambda data: b"TNTIDX" + data[6:], "not an index of Megatron's format"),
        ("a.idx", lambda data: data[:9] + b"\x02" + data[10:], "version 2 of the format"),
        ("a.idx", lambda data: data[:17] + b"\x07" + data[18:], "type 7 of token ids"),
        ("a.idx", lambda data: data[:18] + b"\x03" + data[19:], "3 sequences in 4 documents take 110; it was cut"),
        ("a.idx", lambda data: data[:26] + bytes(8) + data[34:], "4 sequences in -1 documents"),
        ("a.idx", lambda data: data[:38] + b"\x02" + data[39:], "does not describe a.bin"),
        ("a.idx", lambda data: data[:58] + b"\x08" + data[59:], "does not describe a.bin"),
        ("a.idx", lambda data: data[:90] + b"\x03" + data[91:], "does not describe a.bin"),
        ("a.idx", lambda data: data[:114] + b"\x03" + data[115:], "does not describe a.bin"),
    ],
    ids=lambda value: value.replace(" ", "-")[:30] if isinstance(value, str) else "",
)
def test_a_broken_file_is_refused(tmp_path: Path, name: str, change: object, rule: str) -> None:
    write_documents(tmp_path / "a.bin", DOCUMENTS)
    assert callable(change)
    (tmp_path / name).write_bytes(change((tmp_path / name).read_bytes()))
    with pytest.raises(DataError) as caught:
        IndexedTokens(tmp_path / "a.bin")
    assert rule in str(caught.value)


@pytest.mark.parametrize("place", [0, 1, 200, 799])
def test_a_byte_that_changes_in_a_file_of_the_usual_size_is_noticed(tmp_path: Path, place: int) -> None:
    path = tmp_path / "file"
    data = bytes(range(200)) * 4
    path.write_bytes(data)
    checksum = sample_checksum(path)
    path.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
    assert sample_checksum(path) != checksum


def test_blocks_over_all_of_a_large_file_are_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(megatron, "_BLOCK_BYTES", 10)
    monkeypatch.setattr(megatron, "_NUM_BLOCKS", 4)
    path = tmp_path / "file"
    data = bytes(range(200)) * 4
    path.write_bytes(data)
    checksum = sample_checksum(path)
    noticed = []
    for place in range(0, len(data), 5):
        path.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
        noticed += [place] if sample_checksum(path) != checksum else []
    assert noticed == [0, 5, 200, 205, 400, 405, 600, 605]
    path.write_bytes(data + b"xx")
    assert sample_checksum(path) != checksum
