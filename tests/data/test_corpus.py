from __future__ import annotations
import __future__

import json
import os
import re
from pathlib import Path

import pytest

from pipekit.data.corpus import find_corpus, plan_passage_chars, read_passages
from pipekit.errors import DataError


def read_texts(source: str | list[str], **options: object) -> list[str]:
    """Return the documents of a source, parts joined."""
    documents, parts = [], []
    for passage in read_passages(find_corpus(source), **options):  # type: ignore[arg-type]
        parts.append(passage.text)
        if passage.ends_document:
            documents.append("".join(parts))
            parts = []
    assert parts == [], "the last document has no end"
    return documents


def test_stdlib_holds_modules_and_no_tests() -> None:
    names = [file.name.split("/", 1)[1] for file in find_corpus("python-stdlib").files]
    assert {"ast.py", "json/decoder.py"} <= set(names)
    assert names == sorted(names)
    folders = {part for name in names for part in name.split("/")[:-1]}
    assert not folders & {"test", "tests", "idle_test", "site-packages"}


def test_stdlib_text_is_the_source_of_the_modules() -> None:
    texts = read_texts("python-stdlib", max_bytes=500_000)
    assert Path(__future__.__file__).read_text(encoding="utf-8") in texts
    assert sum(len(text.encode()) for text in texts) <= 500_000


def test_folder_is_read_recursively_in_sorted_order(tmp_path: Path) -> None:
    for name in ("b/two.md", "a.txt", "b/one.py", "c.csv", ".git/hidden.txt", "b/.hidden.md", "z.JSONL"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps({"text": name}) if name == "z.JSONL" else name)
    assert read_texts(str(tmp_path)) == ["a.txt", "b/one.py", "b/two.md", "z.JSONL"]


def test_list_of_sources_keeps_its_order_and_repeats(tmp_path: Path) -> None:
    first, second = tmp_path / "1.log", tmp_path / "2.log"
    first.write_text("one")
    second.write_text("two")
    assert read_texts([str(second), str(first), str(second)]) == ["two", "one", "two"]


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


@pytest.mark.parametrize("max_bytes", [1, 5, 6, 7, 9, 10, 11, 100])
def test_max_bytes_cuts_between_characters(tmp_path: Path, max_bytes: int) -> None:
    (tmp_path / "a.txt").write_text("abcde", encoding="utf-8")
    (tmp_path / "b.txt").write_text("€€", encoding="utf-8")  # three bytes each
    texts = read_texts(str(tmp_path), max_bytes=max_bytes)
    assert "".join(texts) == "abcde€€".encode()[:max_bytes].decode(errors="ignore")


def test_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfhello")
    assert read_texts(str(tmp_path / "a.txt")) == ["hello"]


def test_jsonl_reads_the_chosen_key(tmp_path: Path) -> None:
    rows = [{"text": "no", "body": "first\r\nline"}, {"body": ""}, {"body": "half \ud83d pair"}]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n\n".join(json.dumps(row) for row in rows) + "\n")
    first, second = read_texts(str(path), text_key="body")
    assert first == "first\r\nline"
    assert second.startswith("half ")
    assert second.endswith(" pair")
    second.encode()


@pytest.mark.parametrize(
    ("line", "what"),
    [
        (b'{"text": "broken', "not a JSON object"),
        (b'["text"]', "the line is a list"),
        (b'{"body": "x", "id": 3}', "no key 'text' (the line has 'body', 'id'); set data.text_key"),
        (b'{"text": 3}', "key 'text' holds a number"),
        (b'{"text": null}', "key 'text' holds null"),
        (b'{"text": "\xff"}', "not a JSON object"),
    ],
)
def test_bad_jsonl_line_is_named_by_file_and_line(tmp_path: Path, line: bytes, what: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"text": "good"}\n\n' + line + b"\n")
    with pytest.raises(DataError) as caught:
        read_texts(str(path))
    assert f"{path}:3: " in str(caught.value)
    assert what in str(caught.value)


def test_missing_source_is_refused_with_what_to_give(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data\.source=.*no such file or folder.*'python-stdlib', a text file"):
        find_corpus(str(tmp_path / "missing.txt"))
    with pytest.raises(DataError, match="did you mean 'python-stdlib'"):
        find_corpus("python_stdlib")


def test_folder_without_usable_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "table.csv").write_text("1,2")
    with pytest.raises(DataError, match=r"holds no \.txt, \.md, \.py, \.jsonl file"):
        find_corpus(str(tmp_path))
    with pytest.raises(DataError, match="empty list"):
        find_corpus([])


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


def test_identity_follows_content_and_time(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("one")
    before = find_corpus(str(path)).identity
    assert find_corpus(str(path)).identity == before
    os.utime(path, ns=(1, 1))
    assert find_corpus(str(path)).identity != before


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


def test_a_file_that_hides_its_size_is_refused() -> None:
    with pytest.raises(DataError, match="the file holds more than the 0 bytes that its size says"):
        find_corpus("/proc/cpuinfo")
