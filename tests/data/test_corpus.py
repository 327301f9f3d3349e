from __future__ import annotations

import os
from pathlib import Path

import pytest

from pipekit.data.corpus import find_corpus
from pipekit.errors import DataError
from source_texts import read_texts


def test_list_of_sources_keeps_its_order_and_repeats(tmp_path: Path) -> None:
    first, second = tmp_path / "1.log", tmp_path / "2.log"
    first.write_text("one")
    second.write_text("two")
    assert read_texts([str(second), str(first), str(second)]) == ["two", "one", "two"]


@pytest.mark.parametrize("max_bytes", [1, 5, 6, 7, 9, 10, 11, 100])
def test_max_bytes_cuts_between_characters(tmp_path: Path, max_bytes: int) -> None:
    (tmp_path / "a.txt").write_text("abcde", encoding="utf-8")
    (tmp_path / "b.txt").write_text("€€", encoding="utf-8")  # three bytes each
    texts = read_texts(str(tmp_path), max_bytes=max_bytes)
    assert "".join(texts) == "abcde€€".encode()[:max_bytes].decode(errors="ignore")


def test_missing_source_is_refused_with_what_to_give(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data\.source=.*no such file or folder.*'python-stdlib', a file, a folder"):
        find_corpus(str(tmp_path / "missing.txt"))
    with pytest.raises(DataError, match="did you mean 'python-stdlib'"):
        find_corpus("python_stdlib")


def test_identity_follows_content_and_time(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("one")
    before = find_corpus(str(path)).identity
    assert find_corpus(str(path)).identity == before
    os.utime(path, ns=(1, 1))
    assert find_corpus(str(path)).identity != before


def test_a_file_that_hides_its_size_is_refused() -> None:
    with pytest.raises(DataError, match="the file holds more than the 0 bytes that its size says"):
        find_corpus("/proc/cpuinfo")
