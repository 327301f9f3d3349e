"""The format of a file, told by its content; what is known and not read is refused with what to do about it."""

from __future__ import annotations

import logging
from pathlib import Path

from pipekit.data.sources import find_formats
from pipekit.data.sources.compression import open_plain, plain_name
from pipekit.data.sources.formats import SourceFormat
from pipekit.data.sources.text import FOLDER_SUFFIXES
from pipekit.data.sources.text import FORMAT as TEXT
from pipekit.errors import DataError

logger = logging.getLogger(__name__)

_HEAD_BYTES = 1 << 16

# By their first bytes.
_UNREAD: tuple[tuple[bytes, str], ...] = (
    (b"PK\x03\x04", "a zip archive; unpack it, and give its folder"),
    (b"BZh", "a bzip2 file; unpack it with bunzip2"),
    (b"\xfd7zXZ", "an xz file; unpack it with xz --decompress"),
    (b"7z\xbc\xaf", "a 7z archive; unpack it, and give its folder"),
    (b"\x93NUMPY", "a NumPy array; write it as Megatron's token files"),
    (b"\x89HDF", "an HDF5 file; convert it to Parquet"),
    (b"SQLite format 3", "a SQLite database; convert it to Parquet"),
    (b"%PDF", "a PDF file; extract its text, as with pdftotext"),
    (b"\xff\xfe", "text in UTF-16; convert it with iconv -f utf-16 -t utf-8"),
    (b"\xfe\xff", "text in UTF-16; convert it with iconv -f utf-16 -t utf-8"),
)
_TABLE_SUFFIXES = (".csv", ".tsv")
_COMPRESSED_SUFFIXES = (*FOLDER_SUFFIXES, ".jsonl", ".ndjson", ".json")
"""Names of compressed files that are read in a folder, without the suffix of the compression."""


def what_to_give() -> str:
    """The kinds of sources, as they follow "give" in a message."""
    formats = sorted(find_formats(), key=lambda format: -format.vagueness)
    titles = ", ".join(format.title for format in formats if format.example is None)
    names = ", ".join(f"'{format.example}'" for format in formats if format.example is not None)
    return f"{names}, a file, a folder, or a list of those ({titles})"


def recognise(path: Path, *, is_named: bool) -> SourceFormat | None:
    """Return the format of a file, or None for one in a folder that is no data.

    Raises:
        DataError: if the file is named, and has no format that is read; or if it is broken.
    """
    name = plain_name(path)
    if not is_named and name != path.name.lower() and not name.endswith(_COMPRESSED_SUFFIXES):
        return None  # such as an archive or a log, which may be broken as it likes
    with open_plain(path) as stream:
        head = stream.read(_HEAD_BYTES)
    matching = (format for format in find_formats() if format.matches(path, head, is_named=is_named))
    format = next(matching, None)
    if format is not TEXT:
        return format
    reason = _unread_reason(path, head)
    if reason is None:
        return TEXT
    if is_named:
        raise DataError(f"data.source={str(path)!r}: {reason}")
    logger.warning("%s is left out: %s", path, reason)
    return None


def _unread_reason(path: Path, head: bytes) -> str | None:
    """Why a file is no plain text, and what to do; None if it is."""
    for magic, reason in _UNREAD:
        if head.startswith(magic):
            return reason
    if head[257:262] == b"ustar":
        return "a tar archive; unpack it, and give its folder"
    name = plain_name(path)
    if name.endswith(_TABLE_SUFFIXES):
        separator = ", sep='\\t'" if name.endswith(".tsv") else ""
        read = f"pandas.read_csv({path.name!r}{separator})"
        return f"a table of text; convert it to JSON lines: {read}.to_json('data.jsonl', orient='records', lines=True)"
    if name.endswith(".json") and head.lstrip()[:1] in (b"[", b"{"):
        return f"a JSON document, not JSON lines; write an object a line: jq -c '.[]' {path.name} > data.jsonl"
    return f"neither UTF-8 text nor a format that is known; give {what_to_give()}" if b"\0" in head else None
