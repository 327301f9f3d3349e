from __future__ import annotations

from pathlib import Path

import pytest

from pipekit.errors import DataError
from source_texts import read_texts

pyarrow = pytest.importorskip("pyarrow")
TEXTS = [f"text {i}" for i in range(2500)]


def write(path: Path, kind: str) -> Path:
    table = pyarrow.table({"id": range(2500), "text": TEXTS})
    new = pyarrow.ipc.new_stream if kind == "stream" else pyarrow.ipc.new_file
    with new(str(path), table.schema) as writer:
        writer.write_table(table, max_chunksize=900)
    return path


@pytest.mark.parametrize("kind", ["stream", "file"])
def test_both_kinds_of_file_are_told_by_content_and_read(tmp_path: Path, kind: str) -> None:
    assert read_texts(write(tmp_path / "rows.txt", kind)) == TEXTS
    with pytest.raises(DataError, match=r"rows\.txt: no key 'body' among 'id', 'text'; set data\.text_key"):
        read_texts(tmp_path / "rows.txt", text_key="body")


@pytest.mark.parametrize("kind", ["stream", "file"])
@pytest.mark.parametrize("num_bytes", [10, 300, 20_000])
def test_one_that_was_cut_short_is_refused(tmp_path: Path, kind: str, num_bytes: int) -> None:
    path = write(tmp_path / "rows.arrow", kind)
    path.write_bytes(path.read_bytes()[:num_bytes])
    with pytest.raises(DataError, match=r"rows\.arrow: the Arrow file is broken or was cut short \(.+\); get it again"):
        read_texts(path)
