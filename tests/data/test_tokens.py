from __future__ import annotations

import contextlib
import json
from pathlib import Path

import numpy as np
import pytest

from pipekit.data import tokens
from pipekit.data.tokens import TokenFileWriter, is_as_written, load_tokens, token_dtype
from pipekit.errors import DataError


def write_tokens(path: Path, token_ids: list[int], vocab_size: int) -> str:
    with TokenFileWriter(path, vocab_size=vocab_size) as writer:
        for part in np.array_split(np.array(token_ids, dtype=np.int64), 3):
            writer.write(part)
    return writer.fingerprint


@pytest.mark.parametrize(("vocab_size", "dtype"), [(65536, "uint16"), (65537, "uint32")])
def test_tokens_come_back_in_the_smallest_type(tmp_path: Path, vocab_size: int, dtype: str) -> None:
    token_ids = [0, 1, vocab_size - 1, 5, 300, 2]
    write_tokens(tmp_path / "train.bin", token_ids, vocab_size)
    assert token_dtype(vocab_size) == dtype
    assert load_tokens(tmp_path / "train.bin").tolist() == token_ids
    # The bytes are what the format says, whoever reads them.
    raw = np.frombuffer((tmp_path / "train.bin").read_bytes(), dtype=dtype.replace("uint16", "<u2"))
    assert raw.tolist() == token_ids


def test_an_empty_file_is_an_empty_array(tmp_path: Path) -> None:
    write_tokens(tmp_path / "train.bin", [], 300)
    assert load_tokens(tmp_path / "train.bin").tolist() == []


def test_fingerprint_follows_the_tokens_alone(tmp_path: Path) -> None:
    one = write_tokens(tmp_path / "1.bin", [1, 2, 3, 4], 300)
    assert write_tokens(tmp_path / "2.bin", [1, 2, 3, 4], 300) == one
    assert write_tokens(tmp_path / "3.bin", [1, 2, 4, 3], 300) != one


def test_tokens_cannot_be_changed_through_the_map(tmp_path: Path) -> None:
    write_tokens(tmp_path / "train.bin", [1, 2], 300)
    with pytest.raises(ValueError, match="read-only"):
        load_tokens(tmp_path / "train.bin")[0] = 3


def test_writing_that_breaks_off_leaves_no_readable_file(tmp_path: Path) -> None:
    with (
        contextlib.suppress(KeyboardInterrupt),
        TokenFileWriter(tmp_path / "train.bin", vocab_size=9) as writer,
    ):
        writer.write(np.arange(5))
        raise KeyboardInterrupt
    with pytest.raises(DataError, match="no such token file"):
        load_tokens(tmp_path / "train.bin")


def test_a_file_of_another_size_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "train.bin"
    write_tokens(path, [1, 2, 3], 300)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DataError, match=r"5 bytes, but the header says 3 tokens of 2 bytes; delete the folder"):
        load_tokens(path)


@pytest.mark.parametrize("change", [{"version": 99}, {"format": "other"}, {"dtype": "float32"}, {"num_tokens": None}])
def test_a_foreign_header_is_refused(tmp_path: Path, change: dict[str, object]) -> None:
    path = tmp_path / "train.bin"
    write_tokens(path, [1, 2, 3], 300)
    header = json.loads(path.with_suffix(".json").read_text())
    path.with_suffix(".json").write_text(json.dumps(header | change))
    with pytest.raises(DataError, match="not the header of a token file"):
        load_tokens(path)


@pytest.mark.parametrize("place", [0, 1, 200, 799])
def test_a_byte_that_changes_in_a_file_of_the_usual_size_is_noticed(tmp_path: Path, place: int) -> None:
    path = tmp_path / "train.bin"
    write_tokens(path, list(range(400)), 65536)
    assert is_as_written(path)
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)
    assert not is_as_written(path)


def test_blocks_over_all_of_a_large_file_are_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokens, "_BLOCK_BYTES", 10)
    monkeypatch.setattr(tokens, "_NUM_BLOCKS", 4)
    path = tmp_path / "train.bin"
    write_tokens(path, list(range(400)), 65536)
    data = path.read_bytes()
    noticed = []
    for place in range(0, len(data), 5):
        path.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
        noticed += [] if is_as_written(path) else [place]
    assert noticed == [0, 5, 200, 205, 400, 405, 600, 605]
    path.write_bytes(data + b"xx")
    assert not is_as_written(path)
