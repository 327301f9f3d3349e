from __future__ import annotations

import re
from pathlib import Path

import pytest

from pipekit.data.corpus import find_corpus, plan_passage_chars, read_passages
from pipekit.errors import DataError
from source_texts import read_texts


@pytest.mark.parametrize("num_lines", [0, 1, 50, 5000])
def test_long_text_is_cut_at_line_ends_and_loses_nothing(tmp_path: Path, num_lines: int) -> None:
    text = "".join(f"line {index} äöü€\n" for index in range(num_lines))
    (tmp_path / "long.txt").write_text(text, encoding="utf-8")
    passages = list(read_passages(find_corpus(str(tmp_path / "long.txt"))))
    assert "".join(passage.text for passage in passages) == text
    assert [passage.num_bytes for passage in passages] == [len(passage.text.encode()) for passage in passages]
    assert all(passage.text.endswith("\n") for passage in passages)
    assert [passage.ends_document for passage in passages] == [False] * (len(passages) - 1) + [True] * bool(text)
    assert (len(passages) > 20) == (num_lines == 5000)


def test_text_without_line_ends_is_cut_all_the_same(tmp_path: Path) -> None:
    (tmp_path / "long.txt").write_text("x" * 100_000)
    passages = list(read_passages(find_corpus(str(tmp_path / "long.txt"))))
    assert sum(len(passage.text) for passage in passages) == 100_000
    assert max(len(passage.text) for passage in passages) <= 2 * plan_passage_chars(100_000)


def test_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfhello")
    assert read_texts(str(tmp_path / "a.txt")) == ["hello"]


def test_undecodable_file_is_left_out_of_a_folder_and_refused_by_name(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    bad = tmp_path / "bad.txt"
    bad.write_bytes(b"caf\xe9 au lait")
    (tmp_path / "good.txt").write_text("good")
    assert read_texts(str(tmp_path)) == ["good"]
    assert str(bad) in caplog.text
    with pytest.raises(
        DataError, match=r"bad\.txt: not UTF-8 text \(byte 0xe9 in line 1, column 4, at offset 3\); convert it"
    ):
        read_texts(str(bad))


MEBIBYTE = 1 << 20


@pytest.mark.parametrize(
    ("content", "place"),
    [
        (b"ab\ncd\xff", "byte 0xff in line 2, column 3, at offset 5"),
        (b"\n\n" + "\u00e9".encode() + b"\xe9x", "byte 0xe9 in line 3, column 2, at offset 4"),
        (b"cut " + "\u00e9".encode()[:1], "byte 0xc3 in line 1, column 5, at offset 4"),
        # It is read by the mebibyte.
        (b"a" * MEBIBYTE + b"bc\xff", "byte 0xff in line 1, column 1048579, at offset 1,048,578"),
        (
            b"\n" + b"a" * (MEBIBYTE - 2) + "\u00e9".encode() + b"\xff",
            "byte 0xff in line 2, column 1048576, at offset 1,048,577",
        ),
        (b"a" * (MEBIBYTE - 1) + b"\xff", "byte 0xff in line 1, column 1048576, at offset 1,048,575"),
    ],
)
def test_the_first_byte_that_is_not_utf8_has_its_place(tmp_path: Path, content: bytes, place: str) -> None:
    path = tmp_path / "bad.txt"
    path.write_bytes(content)
    with pytest.raises(DataError, match=re.escape(f"not UTF-8 text ({place})")):
        read_texts(str(path))
