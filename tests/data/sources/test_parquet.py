from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pipekit.data.corpus import find_corpus, read_records
from pipekit.errors import DataError
from source_texts import read_texts

pyarrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")
TEXTS = [f"text {i}\r\nof größer {i * i}" for i in range(2500)]


def write(path: Path, columns: dict[str, Any], **options: Any) -> Path:
    parquet.write_table(pyarrow.table(columns), path, **options)
    return path


@pytest.mark.parametrize("compression", ["none", "snappy", "zstd"])
def test_the_chosen_column_is_read_from_every_row_group(tmp_path: Path, compression: str) -> None:
    columns = {"id": range(2500), "body": TEXTS, "text": ["no"] * 2500}
    path = write(tmp_path / "rows", columns, row_group_size=700, compression=compression)
    assert read_texts(path, text_key="body") == TEXTS


@pytest.mark.parametrize("kind", ["large_string", "dictionary"])
def test_other_types_of_text_are_read_too(tmp_path: Path, kind: str) -> None:
    column = pyarrow.array(TEXTS)
    column = column.dictionary_encode() if kind == "dictionary" else column.cast(pyarrow.large_string())
    assert read_texts(write(tmp_path / "rows", {"text": column})) == TEXTS


def test_records_have_nested_values(tmp_path: Path) -> None:
    messages = [[{"role": "user", "content": "hi"}], []]
    path = write(tmp_path / "rows.parquet", {"messages": messages, "id": [1, 2]})
    records = list(read_records(find_corpus(str(path)), ["messages"]))
    assert [record.fields for record in records] == [{"messages": message} for message in messages]
    assert records[1].place == f"{path}: row 2"


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"id": [1], "body": ["a"]}, r"rows: no key 'text' among 'id', 'body'; set data\.text_key"),
        ({"text": [1]}, r"rows: row 1: key 'text' holds a number, not a string"),
        ({"text": ["a", None]}, r"rows: row 2: key 'text' holds null, not a string"),
        ({"text": [["a"]]}, r"rows: row 1: key 'text' holds a list, not a string"),
        ({"text": [b"a"]}, r"rows: row 1: key 'text' holds a bytes, not a string"),
    ],
)
def test_a_column_without_text_is_refused(tmp_path: Path, columns: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_texts(write(tmp_path / "rows", columns))


def test_a_broken_file_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.parquet", {"text": TEXTS})
    whole = path.read_bytes()
    for data in (whole[:-10], whole[:2000], whole[:4], whole[:1000] + bytes(5000) + whole[6000:]):
        path.write_bytes(data)
        with pytest.raises(DataError, match=r"rows\.parquet: the Parquet file is broken or was cut short \(.+\); get"):
            read_texts(path)
