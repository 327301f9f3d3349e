"""Plain text files: UTF-8, one document a file."""

from __future__ import annotations

import io
import logging
from collections.abc import Iterator
from pathlib import Path

from pipekit.data.sources.compression import open_plain, plain_name
from pipekit.data.sources.formats import CorpusFile, TextFormat, split_text
from pipekit.errors import DataError

logger = logging.getLogger(__name__)

FOLDER_SUFFIXES = (".txt", ".md", ".py")
"""Suffixes of the files that are read in a folder, where other text files are settings, tables and logs."""


class PlainText(TextFormat):
    """A file that is one document. Any other format goes before it."""

    title = "plain text"
    vagueness = 9

    def matches(self, path: Path, head: bytes, *, is_named: bool) -> bool:
        return is_named or plain_name(path).endswith(FOLDER_SUFFIXES)

    def read_passages(self, file: CorpusFile, text_key: str, max_chars: int) -> Iterator[tuple[str, bool]]:
        if not file.is_named and not _is_utf8(file.path):
            logger.warning("%s is not UTF-8 text and is left out", file.path)
            return
        try:
            with open_plain(file.path) as stream, io.TextIOWrapper(stream, encoding="utf-8-sig") as text:
                yield from split_text(text, max_chars)
        except UnicodeDecodeError as error:
            raise DataError(
                f"{file.path}: not UTF-8 text ({_find_wrong_byte(file.path)}); convert it, as with "
                f"'iconv -f latin1 -t utf-8', or take it out of data.source"
            ) from error


FORMAT = PlainText()


def _is_utf8(path: Path) -> bool:
    try:
        with open_plain(path) as stream, io.TextIOWrapper(stream, encoding="utf-8") as text:
            while text.read(1 << 20):
                pass
    except UnicodeDecodeError:
        return False
    return True


def _find_wrong_byte(path: Path) -> str:
    """Value and place of the first byte of a file that is not UTF-8."""
    line, column, offset, rest = 1, 1, 0, b""
    with open_plain(path) as stream:
        while True:
            chunk = stream.read(1 << 20)
            data = rest + chunk
            try:
                text, rest, is_wrong = data.decode(), b"", False
            except UnicodeDecodeError as error:
                text, rest = data[: error.start].decode(), data[error.start :]
                # A character may be cut by the end of the chunk.
                is_wrong = len(rest) > 3 or not chunk
            offset += len(data) - len(rest)
            line += text.count("\n")
            column = len(text) - text.rfind("\n") if "\n" in text else column + len(text)
            if is_wrong:
                return f"byte {rest[0]:#04x} in line {line}, column {column}, at offset {offset:,}"
            if not chunk:
                return "it has changed while it was read"
