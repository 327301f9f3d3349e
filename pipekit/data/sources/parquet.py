"""Parquet files: columns of values, compressed, one of which holds the text of a document."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from pipekit.data.sources.arrow import read_rows, reading_columns
from pipekit.data.sources.formats import CorpusFile, Record, RecordFormat, need

_BATCH_ROWS = 1000
_BUFFER_BYTES = 1 << 20


class Parquet(RecordFormat):
    """A Parquet file, of which the columns that are needed are read, and some rows at a time."""

    title = "Parquet"

    def matches(self, path: Path, head: bytes, *, is_named: bool) -> bool:
        return head.startswith((b"PAR1", b"PARE"))

    def read_records(self, file: CorpusFile, keys: tuple[str, ...] | None) -> Iterator[Record]:
        parquet = need("pyarrow.parquet", file.path)
        with reading_columns(file), parquet.ParquetFile(str(file.path), buffer_size=_BUFFER_BYTES) as stored:
            schema = stored.schema_arrow
            columns = [key for key in keys if key in schema.names] if keys else None
            yield from read_rows(stored.iter_batches(_BATCH_ROWS, columns=columns), schema, file, keys)


FORMAT = Parquet()
