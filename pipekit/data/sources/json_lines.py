"""JSON lines: a JSON object a line, one field of which holds the text of a document."""

from __future__ import annotations

import re
from codecs import BOM_UTF8
from collections.abc import Iterator
from pathlib import Path

from pipekit.data.sources.compression import open_plain, plain_name
from pipekit.data.sources.formats import CorpusFile, Record, RecordFormat, json_type
from pipekit.errors import DataError
from pipekit.files import parse_json

_SUFFIXES = (".jsonl", ".ndjson")
_OBJECT_BEGINS = re.compile(rb'\s*\{\s*"(?:[^"\\]|\\.)*"[ \t]*:')


class JsonLines(RecordFormat):
    """A file whose first line that is not blank is a JSON object, or which is named as such a file."""

    title = "JSON lines"
    vagueness = 5

    def matches(self, path: Path, head: bytes, *, is_named: bool) -> bool:
        name = plain_name(path)
        if name.endswith(_SUFFIXES):
            return b"\0" not in head
        if not (is_named or name.endswith(".json")):
            return False
        first, line_end, rest = head.removeprefix(BOM_UTF8).lstrip().partition(b"\n")
        if not line_end:
            # A file that is one object is a document of JSON, unless it is so long that it can be nothing but a record.
            return len(head) > 1 << 15 and _OBJECT_BEGINS.match(first) is not None
        return _is_object(first) and (not rest.strip() or _OBJECT_BEGINS.match(rest) is not None)

    def read_records(self, file: CorpusFile, keys: tuple[str, ...] | None) -> Iterator[Record]:
        with open_plain(file.path) as stream:
            for line_number, line in enumerate(stream, start=1):
                if not line.strip():
                    continue
                place = f"{file.path}:{line_number}"
                try:
                    row = parse_json(line.removeprefix(BOM_UTF8).decode())
                except ValueError as error:  # both of undecodable bytes and of malformed JSON
                    rule = f"not a JSON object on one line ({error}); correct or delete the line"
                    raise DataError(f"{place}: {rule}") from error
                if not isinstance(row, dict):
                    key = keys[0] if keys else "text"
                    rule = f'each must be an object such as {{"{key}": "..."}}'
                    raise DataError(f"{place}: the line is {json_type(row)}, and {rule}")
                yield Record(place, row)


FORMAT = JsonLines()


def _is_object(line: bytes) -> bool:
    try:
        return isinstance(parse_json(line), dict)
    except ValueError:
        return False
