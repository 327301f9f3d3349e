from __future__ import annotations

import gzip
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from pipekit.data.corpus import find_corpus
from pipekit.data.sources.compression import open_plain
from pipekit.errors import DataError
from source_texts import read_texts

pyarrow = pytest.importorskip("pyarrow")
LINES = b"".join(b'{"text": "line %d of %d"}\n' % (i, i * i) for i in range(20_000))


def zstd(data: bytes) -> bytes:
    return bytes(pyarrow.Codec("zstd").compress(data, asbytes=True))


COMPRESS: list[Callable[[bytes], bytes]] = [gzip.compress, zstd]


@pytest.mark.parametrize("compress", COMPRESS)
def test_a_compressed_file_is_read_as_what_it_holds_whatever_its_name(
    tmp_path: Path, compress: Callable[[bytes], bytes]
) -> None:
    # Several compressed parts in a row are one file, as when `cat` has joined them.
    (tmp_path / "rows").write_bytes(compress(LINES[:100_000]) + compress(LINES[100_000:]))
    with open_plain(tmp_path / "rows") as stream:
        assert stream.read() == LINES
    assert read_texts(tmp_path / "rows", max_bytes=30) == ["line 0 of 0", "line 1 of 1", "line 2 o"]
    (tmp_path / "text.txt.zst").write_bytes(compress("größer\r\n".encode()))
    assert read_texts(tmp_path / "text.txt.zst") == ["größer\n"]


@pytest.mark.parametrize("compress", COMPRESS)
@pytest.mark.parametrize("kept", [0.5, 0.9999])
def test_a_broken_one_is_an_error_and_no_shorter_text(
    tmp_path: Path, compress: Callable[[bytes], bytes], kept: float
) -> None:
    data = compress(LINES)
    path = tmp_path / "rows.jsonl.gz"
    path.write_bytes(data[: int(len(data) * kept)])
    with pytest.raises(
        DataError, match=r"rows\.jsonl\.gz: the (gzip|zstd) file is broken or was cut short \(.+\); get"
    ):
        read_texts(path)
    middle = len(data) // 2
    path.write_bytes(data[:middle] + bytes(50) + data[middle + 50 :])
    with pytest.raises(DataError, match=r"rows\.jsonl\.gz"):
        read_texts(path)


def test_a_file_that_is_no_archive_behind_its_first_bytes_is_refused_when_it_is_found(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl.gz").write_bytes(b"\x1f\x8b" + b"no gzip" * 10)
    (tmp_path / "a.jsonl.zst").write_bytes(b"\x28\xb5\x2f\xfd" + b"no zstd" * 10)
    for name in ("a.jsonl.gz", "a.jsonl.zst"):
        with pytest.raises(DataError, match="is broken or was cut short"):
            find_corpus(str(tmp_path / name))


def test_without_the_library_the_error_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.zst").write_bytes(zstd(LINES))
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(DataError, match=r'a\.zst: .* needs the library pyarrow .*; pip install "pipekit\[data\]"'):
        find_corpus(str(tmp_path / "a.zst"))
