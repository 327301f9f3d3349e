from __future__ import annotations

import gzip
from pathlib import Path

import pytest

from pipekit.data.corpus import find_corpus
from pipekit.data.sources import find_formats
from pipekit.data.sources.recognise import recognise
from pipekit.errors import DataError

OBJECT = b'{"text": "a"}\n'


def _shown(value: object) -> str:
    """Words of a case for its name, without the contents of files."""
    return value if isinstance(value, str) else ""


@pytest.mark.parametrize(
    ("name", "content", "title"),
    [
        ("a.txt", b"some words\n", "plain text"),
        ("a.log", b"[1] some words\n", "plain text"),
        ("a.md", b'{"text": "a"}\nand words\n', "plain text"),
        ("empty", b"", "plain text"),
        ("a.txt", OBJECT * 3, "JSON lines"),
        ("a", b"\xef\xbb\xbf\n\n" + OBJECT, "JSON lines"),
        ("a.json", OBJECT, "JSON lines"),
        ("a.json", b'{"text": "' + b"long " * 20_000 + b'"}\n', "JSON lines"),
        ("a.jsonl", b"[1]\n", "JSON lines"),
        ("a.jsonl", b"PAR1" + bytes(20), "Parquet"),
        ("a.txt", b"ARROW1\0\0" + bytes(20), "Arrow"),
        ("a.txt", b"\xff\xff\xff\xff\x10\x02\0\0" + bytes(20), "Arrow"),
    ],
    ids=_shown,
)
def test_a_named_file_is_what_its_content_says(tmp_path: Path, name: str, content: bytes, title: str) -> None:
    (tmp_path / name).write_bytes(content)
    found = recognise(tmp_path / name, is_named=True)
    assert found is not None
    assert found.title == title


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "a.csv",
            b"text,label\nsome words,1\n",
            r"a table of text; convert it to JSON lines: pandas\.read_csv\('a\.csv'\)",
        ),
        ("a.json", b'[{"text": "a"}]', r"a JSON document, not JSON lines; .*: jq -c '\.\[\]' a\.json > data\.jsonl"),
        ("a.json", b'{\n "text": "a"\n}', "a JSON document, not JSON lines"),
        (
            "a.tar.gz",
            gzip.compress(b"name".ljust(257, b"\0") + b"ustar" + bytes(250), mtime=0),
            "a tar archive; unpack it",
        ),
        ("a.zip", b"PK\x03\x04" + bytes(20), "a zip archive; unpack it"),
        ("a.txt", "words".encode("utf-16"), r"text in UTF-16; convert it with iconv -f utf-16 -t utf-8"),
        ("a.jsonl", bytes(100), "neither UTF-8 text nor a format that is known"),
    ],
    ids=_shown,
)
def test_one_that_is_not_read_is_refused_with_what_to_do(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=f"{name}'.*{message}"):
        find_corpus(str(tmp_path / name))


def test_an_unknown_format_is_refused_with_those_that_are_read(tmp_path: Path) -> None:
    (tmp_path / "a.bin").write_bytes(bytes(range(256)))
    with pytest.raises(DataError, match="neither UTF-8 text nor a format that is known; give") as caught:
        find_corpus(str(tmp_path / "a.bin"))
    for format in find_formats():
        assert (format.example or format.title) in str(caught.value)
