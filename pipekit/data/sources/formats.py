"""Bases of the formats of data sources: a name, a way to tell a file by its content, and a reader.

Three kinds differ in what a file holds: text, records with a field of text, or token ids.
"""

from __future__ import annotations

import io
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar, TextIO

import numpy as np
import numpy.typing as npt

from pipekit.errors import DataError
from pipekit.settings.base import show

TokenIds = npt.NDArray[np.integer[Any]]


@dataclass(frozen=True)
class CorpusFile:
    """One file of a source.

    `name` and `mtime_ns` identify its content together with its size. Files that the user did not name one by
    one (`is_named=False`) are skipped where they are not UTF-8; a named one is then an error.
    """

    path: Path
    name: str
    num_bytes: int
    mtime_ns: int | None
    is_named: bool
    format: SourceFormat


@dataclass(frozen=True)
class Record:
    """A record of a file: its place, for messages, and its fields by name."""

    place: str
    fields: Mapping[str, Any]


class SourceFormat(ABC):
    """A format of data, which is told by content. It has no state, so that one instance serves all files."""

    title: ClassVar[str]
    """Its name, as in "Parquet"."""

    example: ClassVar[str | None] = None
    """The form of a source that is a name, and no path."""

    vagueness: ClassVar[int] = 0
    """Formats that may be mistaken for others have a larger one, and are asked later."""

    def find(self, source: str) -> list[CorpusFile] | None:
        """Files of a source that is not one file: a name, or a folder of a layout of its own. None if it is no such.

        Raises:
            DataError: if it is one, and cannot be used.
        """
        return None

    def matches(self, path: Path, head: bytes, *, is_named: bool) -> bool:
        """True if a file has this format.

        Args:
            path: of the file.
            head: its first bytes, decompressed.
            is_named: False for a file that was found in a folder, where some are no data.
        """
        return False


class TextFormat(SourceFormat):
    """Files that give text."""

    @abstractmethod
    def read_passages(self, file: CorpusFile, text_key: str, max_chars: int) -> Iterator[tuple[str, bool]]:
        """Yield passages, as `split_text` does, and whether each ends its document.

        Raises:
            DataError: if the file is broken, or holds no text under `text_key`.
        """


class RecordFormat(TextFormat):
    """Files of records, one of whose fields holds the text of a document."""

    @abstractmethod
    def read_records(self, file: CorpusFile, keys: tuple[str, ...] | None) -> Iterator[Record]:
        """Yield the records in order, with these fields where that saves time, or with all.

        Raises:
            DataError: if the file is broken.
        """

    def read_passages(self, file: CorpusFile, text_key: str, max_chars: int) -> Iterator[tuple[str, bool]]:
        for record in self.read_records(file, (text_key,)):
            text = text_of(record, text_key)
            if 0 < len(text) < max_chars:
                yield text, True
            else:
                yield from split_text(io.StringIO(text, newline=""), max_chars)


class TokenFormat(SourceFormat):
    """Files that hold token ids of a tokenizer."""

    @abstractmethod
    def read_token_ids(self, file: CorpusFile) -> Iterator[TokenIds]:
        """Yield the token ids `(N,)` of each document, memory-mapped.

        Raises:
            DataError: if the file is broken.
        """


def describe_file(path: Path, format: SourceFormat, *, is_named: bool) -> CorpusFile:
    """Return a file with what identifies its content."""
    status = path.stat()
    return CorpusFile(path, str(path.resolve()), status.st_size, status.st_mtime_ns, is_named, format)


def split_text(stream: TextIO, max_chars: int) -> Iterator[tuple[str, bool]]:
    """Yield `(text, is_last)`, with `max_chars` to twice as many characters, split at line ends if there are any."""

    def read_passage() -> str:
        text = stream.read(max_chars)
        return text if text.endswith("\n") or len(text) < max_chars else text + stream.readline(max_chars)

    text = read_passage()
    while text:
        following = read_passage()
        yield text, not following
        text = following


def text_of(record: Record, text_key: str) -> str:
    """Return the text of a record; a DataError with the place if it has none."""
    check_columns(record.fields, (text_key,), record.place)
    text = record.fields[text_key]
    if not isinstance(text, str):
        raise DataError(
            f"{record.place}: key {text_key!r} holds {json_type(text)}, not a string; "
            "set data.text_key to the key with the text"
        )
    return whole_characters(text)


def whole_characters(text: str) -> str:
    """Text without halves of surrogate pairs, which JSON can write, and which are no characters.

    Example:
        >>> whole_characters("half: \\ud83d")
        'half: ���'
    """
    return text if text.isascii() else text.encode("utf-8", "surrogatepass").decode("utf-8", "replace")


def check_columns(names: Iterable[str], keys: Iterable[str], where: object) -> None:
    """Check that fields are among those of a record or a file; a DataError that names those that are there."""
    known = list(names)
    for key in keys:
        if key not in known:
            among = f" among {', '.join(repr(show(name)) for name in known[:8])}" if known else ", nor any other"
            raise DataError(f"{where}: no key {key!r}{among}; set data.text_key to the one with the text")


def json_type(value: object) -> str:
    """Name of the type of a value of JSON, with its article."""
    names = {dict: "an object", list: "a list", str: "a string", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number" if isinstance(value, (int, float)) else f"a {type(value).__name__}")


def need(library: str, where: object) -> Any:
    """Import a library of the extra `data`; a DataError that says how to install it if it is not there."""
    try:
        return import_module(library)
    except ImportError as error:
        raise DataError(
            f'{where}: to read it needs the library {library.partition(".")[0]} ({error}); pip install "pipekit[data]"'
        ) from error
