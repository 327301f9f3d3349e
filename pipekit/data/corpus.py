"""Text corpora: the files that a source names, and the documents in them.

A document longer than some tens of thousands of characters is read in passages, so that a file of any size needs little
memory and a corpus that is one long file can still be divided into training and held-out text.
"""

from __future__ import annotations

import glob
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipekit.data.sources import find_formats
from pipekit.data.sources.folder import find_in_folder
from pipekit.data.sources.formats import (
    CorpusFile,
    Record,
    RecordFormat,
    TextFormat,
    TokenFormat,
    TokenIds,
    describe_file,
)
from pipekit.data.sources.recognise import recognise, what_to_give
from pipekit.data.sources.standard_library import NAME as STDLIB_SOURCE
from pipekit.errors import DataError
from pipekit.settings.base import show
from pipekit.settings.suggest import closest

MAX_PASSAGE_CHARS = 64 * 1024
MIN_PASSAGE_CHARS = 1024
MIN_NUM_PASSAGES = 64


@dataclass(frozen=True)
class Passage:
    """A document, or a section of a long one; `ends_document` is False where it goes on in the next passage.

    A conversation is the `record` that holds it, and has no text yet.
    """

    text: str
    num_bytes: int
    ends_document: bool
    record: Record | None = None


@dataclass(frozen=True)
class Corpus:
    """The files that a source names, in reading order. All hold text, or all hold token ids."""

    files: tuple[CorpusFile, ...]

    @property
    def num_bytes(self) -> int:
        """The size of all files, in bytes."""
        return sum(file.num_bytes for file in self.files)

    @property
    def identity(self) -> list[tuple[str, int, int | None]]:
        """Name, size and time of each file, which tell this corpus from another without reading it."""
        return [(file.name, file.num_bytes, file.mtime_ns) for file in self.files]

    @property
    def token_files(self) -> tuple[CorpusFile, ...]:
        """The files, where they hold token ids; none where they hold text."""
        return tuple(file for file in self.files if isinstance(file.format, TokenFormat))


def find_corpus(source: str | Sequence[str]) -> Corpus:
    """Return the files of `source`. Of each, no more is read than tells its format.

    Args:
        source: what a format of `pipekit.data.sources` knows by name, a file, a pattern of files such as
            `data/*.parquet`, a folder, or a list of those. A source that stands twice in the list is read twice.

    Raises:
        DataError: if a path does not exist, there is no file to read, or one of an unknown format; or if some hold
            text and others token ids.
    """
    sources = [source] if isinstance(source, str) else list(source)
    if not sources:
        raise DataError(f"data.source is an empty list; give {what_to_give()}")
    corpus = Corpus(files=tuple(file for entry in sources for file in _find_files(entry)))
    if 0 < len(corpus.token_files) < len(corpus.files):
        text = next(file for file in corpus.files if file not in corpus.token_files)
        raise DataError(
            f"data.source: {corpus.token_files[0].path} holds token ids, and {text.path} text; give one kind, or both "
            "as entries of data.mixture"
        )
    return corpus


def read_passages(corpus: Corpus, *, text_key: str = "text", max_bytes: int | None = None) -> Iterator[Passage]:
    """Yield the documents of a corpus of text in order, long ones in several passages; empty ones are left out.

    Args:
        corpus: the files to read.
        text_key: the field of a record that holds its text.
        max_bytes: stop after so many bytes of text (UTF-8).

    Raises:
        DataError: if a file cannot be read, a named file is not UTF-8, or a record has no text under `text_key`.
    """
    max_chars = plan_passage_chars(corpus.num_bytes if max_bytes is None else min(corpus.num_bytes, max_bytes))
    num_bytes_left = math.inf if max_bytes is None else max_bytes
    for file in corpus.files:
        if not isinstance(file.format, TextFormat):
            raise DataError(f"{file.path}: holds token ids, and no text; give a source of text")
        for text, ends_document in file.format.read_passages(file, text_key, max_chars):
            encoded = text.encode()
            if len(encoded) >= num_bytes_left:
                if text := encoded[: int(num_bytes_left)].decode(errors="ignore"):
                    yield Passage(text=text, num_bytes=len(text.encode()), ends_document=True)
                return
            num_bytes_left -= len(encoded)
            yield Passage(text=text, num_bytes=len(encoded), ends_document=ends_document)


def read_records(corpus: Corpus, keys: Sequence[str] | None = None) -> Iterator[Record]:
    """Yield the records of a corpus in order, with these fields where that saves time, or with all.

    Raises:
        DataError: if a file cannot be read, or is one of plain text.
    """
    for file in corpus.files:
        if not isinstance(file.format, RecordFormat):
            raise DataError(
                f"{file.path}: {file.format.title} has no fields of records; give JSON lines, Parquet or Arrow files"
            )
        yield from file.format.read_records(file, None if keys is None else tuple(keys))


def read_conversations(corpus: Corpus, *, max_bytes: int | None = None) -> Iterator[Passage]:
    """Yield the records of a corpus in order, each as a document.

    Args:
        corpus: the files to read.
        max_bytes: stop before the record with which there would be more bytes than these (UTF-8).

    Raises:
        DataError: as `read_records`.
    """
    num_bytes_left = math.inf if max_bytes is None else max_bytes
    for record in read_records(corpus):
        num_bytes = len(str(dict(record.fields)).encode("utf-8", "replace"))
        num_bytes_left -= num_bytes
        if num_bytes_left < 0:
            return
        yield Passage(text="", num_bytes=num_bytes, ends_document=True, record=record)


def read_token_ids(corpus: Corpus) -> Iterator[TokenIds]:
    """Yield the token ids `(N,)` of each document of a corpus of token files, memory-mapped.

    Raises:
        DataError: if a file is broken.
    """
    for file in corpus.token_files:
        assert isinstance(file.format, TokenFormat)
        yield from file.format.read_token_ids(file)


def plan_passage_chars(num_bytes: int) -> int:
    """Number of characters of a document that are read at a time.

    A small corpus is read in smaller passages, so that it too has many.

    Example:
        >>> plan_passage_chars(1_000_000), plan_passage_chars(1_000_000_000)
        (15625, 65536)
    """
    return min(MAX_PASSAGE_CHARS, max(MIN_PASSAGE_CHARS, num_bytes // MIN_NUM_PASSAGES))


def _find_files(source: str) -> list[CorpusFile]:
    path = Path(source).expanduser()
    try:
        for format in find_formats():
            if (files := format.find(source)) is not None:
                return files
        if path.is_dir():
            return find_in_folder(path, source)
        if path.is_file():
            return [_find_file(path, source)]
        if matching := sorted(glob.glob(str(path), recursive=True)):
            return [_find_file(Path(found), source) for found in matching if Path(found).is_file()]
    except OSError as error:
        raise DataError(f"data.source={show(source)}: {error.strerror or error}") from error
    hint = f"did you mean '{STDLIB_SOURCE}'?" if closest(source, [STDLIB_SOURCE]) else f"give {what_to_give()}"
    raise DataError(f"data.source={source!r}: no such file or folder (looked at {path.absolute()}); {hint}")


def _find_file(path: Path, source: str) -> CorpusFile:
    format = recognise(path, is_named=True)
    assert format is not None, "a named file has a format, or is refused"
    file = describe_file(path, format, is_named=True)
    if not file.num_bytes and _has_content(path):
        raise DataError(
            f"data.source={source!r}: the file holds more than the 0 bytes that its size says, as those of "
            "/proc do; give a copy of it"
        )
    return file


def _has_content(path: Path) -> bool:
    with path.open("rb") as stream:
        return bool(stream.read(1))
