"""Arrow files, as `datasets` keeps them: columns of values, memory-mapped; both Arrow's stream and its file."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from pipekit.data.sources.formats import CorpusFile, Record, RecordFormat, check_columns, need
from pipekit.errors import DataError

_FILE, _STREAM = b"ARROW1\0\0", b"\xff\xff\xff\xff"
_MAX_HEADER_BYTES = 1 << 24
_ROWS = 1000


class Arrow(RecordFormat):
    """A file of Arrow's, one of whose columns holds the text."""

    title = "Arrow"

    def matches(self, path: Path, head: bytes, *, is_named: bool) -> bool:
        # A stream begins with the length of its schema.
        length = int.from_bytes(head[4:8], "little")
        return head.startswith(_FILE) or (head.startswith(_STREAM) and 0 < length < _MAX_HEADER_BYTES)

    def read_records(self, file: CorpusFile, keys: tuple[str, ...] | None) -> Iterator[Record]:
        pyarrow = need("pyarrow", file.path)
        with reading_columns(file), pyarrow.memory_map(str(file.path)) as mapped:
            if mapped.read(len(_FILE)) == _FILE:
                reader = pyarrow.ipc.open_file(mapped)
                batches = map(reader.get_batch, range(reader.num_record_batches))
            else:
                mapped.seek(0)
                reader = pyarrow.ipc.open_stream(mapped)
                batches = iter(reader)
            yield from read_rows(batches, reader.schema, file, keys)


FORMAT = Arrow()


@contextlib.contextmanager
def reading_columns(file: CorpusFile) -> Iterator[None]:
    """Run the block, and raise an error of the library in it as one that names the file."""
    pyarrow = need("pyarrow", file.path)
    try:
        yield
    except (OSError, pyarrow.ArrowException) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
        raise DataError(
            f"{file.path}: the {file.format.title} file is broken or was cut short ({reason}); get it again, or take "
            "it out of data.source"
        ) from error


def read_rows(batches: Iterable[Any], schema: Any, file: CorpusFile, keys: tuple[str, ...] | None) -> Iterator[Record]:
    """Yield the rows of batches of columns, with the columns of these names; a DataError if one is not there."""
    names = schema.names
    check_columns(names, keys or (), file.path)
    number = 0
    for batch in batches:
        for begin in range(0, batch.num_rows, _ROWS):
            part = batch.slice(begin, _ROWS)
            for row in part.select(list(keys) if keys else names).to_pylist():
                number += 1
                yield Record(f"{file.path}: row {number}", row)
