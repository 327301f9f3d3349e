"""Text corpora: the files that a source names, and the documents in them.

A document longer than some tens of thousands of characters is read in passages, so that a file of any size needs little
memory and a corpus that is one long file can still be divided into training and held-out text.
"""

from __future__ import annotations

import difflib
import io
import logging
import math
import os
import platform
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from pipekit.errors import DataError
from pipekit.files import parse_json
from pipekit.settings.base import show

logger = logging.getLogger(__name__)

STDLIB_SOURCE = "python-stdlib"
FOLDER_SUFFIXES = (".txt", ".md", ".py", ".jsonl")
MAX_PASSAGE_CHARS = 64 * 1024
MIN_PASSAGE_CHARS = 1024
MIN_NUM_PASSAGES = 64

# Tests, other people's packages, and tables written by programs, which are no prose.
_STDLIB_SKIPPED_FOLDERS = frozenset(
    {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "encodings", "pydoc_data"}
)
_WHAT_TO_GIVE = (
    f"'{STDLIB_SOURCE}', a text file, a .jsonl file, a folder of {', '.join(FOLDER_SUFFIXES)} files, or a list of those"
)


@dataclass(frozen=True)
class CorpusFile:
    """One file of a corpus.

    `name` and `mtime_ns` identify its content together with its size. Files that the user did not name one by
    one (`is_named=False`) are skipped where they are not UTF-8; a named one is then an error.
    """

    path: Path
    name: str
    num_bytes: int
    mtime_ns: int | None
    is_named: bool


@dataclass(frozen=True)
class Passage:
    """A document, or a section of a long one; `ends_document` is False where it goes on in the next passage."""

    text: str
    num_bytes: int
    ends_document: bool


@dataclass(frozen=True)
class Corpus:
    """The files that a source names, in reading order."""

    files: tuple[CorpusFile, ...]

    @property
    def num_bytes(self) -> int:
        """The size of all files, in bytes."""
        return sum(file.num_bytes for file in self.files)

    @property
    def identity(self) -> list[tuple[str, int, int | None]]:
        """Name, size and time of each file, which tell this corpus from another without reading it."""
        return [(file.name, file.num_bytes, file.mtime_ns) for file in self.files]


def find_corpus(source: str | Sequence[str]) -> Corpus:
    """Return the files of `source`, without reading them.

    Args:
        source: `python-stdlib` (the modules of the running interpreter's standard library, without their tests), a text
            file, a `.jsonl` file, a folder (every `.txt`, `.md`, `.py` and `.jsonl` file under it, hidden ones left
            out, in sorted order), or a list of those. A source that stands twice in the list is read twice.

    Raises:
        DataError: if a path does not exist, or there is no file to read.
    """
    sources = [source] if isinstance(source, str) else list(source)
    if not sources:
        raise DataError(f"data.source is an empty list; give {_WHAT_TO_GIVE}")
    return Corpus(files=tuple(file for entry in sources for file in _find_files(entry)))


def read_passages(corpus: Corpus, *, text_key: str = "text", max_bytes: int | None = None) -> Iterator[Passage]:
    """Yield the documents of `corpus` in order, long ones in several passages; empty ones are left out.

    Args:
        corpus: the files to read. A `.jsonl` file holds one document a line, any other file is one document.
        text_key: the field of a `.jsonl` line that holds its text.
        max_bytes: stop after so many bytes of text (UTF-8).

    Raises:
        DataError: if a file cannot be read, a named file is not UTF-8, or a `.jsonl` line has no text under `text_key`.
    """
    max_chars = plan_passage_chars(corpus.num_bytes if max_bytes is None else min(corpus.num_bytes, max_bytes))
    num_bytes_left = math.inf if max_bytes is None else max_bytes
    for file in corpus.files:
        for text, ends_document in _read_file(file, text_key, max_chars):
            encoded = text.encode()
            if len(encoded) >= num_bytes_left:
                if text := encoded[: int(num_bytes_left)].decode(errors="ignore"):
                    yield Passage(text=text, num_bytes=len(text.encode()), ends_document=True)
                return
            num_bytes_left -= len(encoded)
            yield Passage(text=text, num_bytes=len(encoded), ends_document=ends_document)


def plan_passage_chars(num_bytes: int) -> int:
    """Number of characters of a document that are read at a time.

    A small corpus is read in smaller passages, so that it too has many.

    Example:
        >>> plan_passage_chars(1_000_000), plan_passage_chars(1_000_000_000)
        (15625, 65536)
    """
    return min(MAX_PASSAGE_CHARS, max(MIN_PASSAGE_CHARS, num_bytes // MIN_NUM_PASSAGES))


def _find_files(source: str) -> list[CorpusFile]:
    if source == STDLIB_SOURCE:
        return _find_stdlib_files()
    path = Path(source).expanduser()
    try:
        if path.is_dir():
            files = [_describe_file(found, is_named=False) for found in _walk(path, FOLDER_SUFFIXES)]
            if not files:
                rule = f"the folder holds no {', '.join(FOLDER_SUFFIXES)} file"
                raise DataError(f"data.source={source!r}: {rule}; give {_WHAT_TO_GIVE}")
            return files
        if path.is_file():
            file = _describe_file(path, is_named=True)
            if not file.num_bytes and _has_content(path):
                raise DataError(
                    f"data.source={source!r}: the file holds more than the 0 bytes that its size says, as those of "
                    "/proc do; give a copy of it"
                )
            return [file]
    except OSError as error:
        raise DataError(f"data.source={show(source)}: {error.strerror or error}") from error
    guess = difflib.get_close_matches(source.lower(), [STDLIB_SOURCE], cutoff=0.6)
    hint = f"did you mean '{guess[0]}'?" if guess else f"give {_WHAT_TO_GIVE}"
    raise DataError(f"data.source={source!r}: no such file or folder (looked at {path.absolute()}); {hint}")


def _has_content(path: Path) -> bool:
    with path.open("rb") as stream:
        return bool(stream.read(1))


def _find_stdlib_files() -> list[CorpusFile]:
    root = Path(sysconfig.get_path("stdlib"))
    prefix = f"{STDLIB_SOURCE} {platform.python_version()}"
    files = [
        CorpusFile(
            path=path,
            name=f"{prefix}/{path.relative_to(root).as_posix()}",
            num_bytes=path.stat().st_size,
            mtime_ns=None,  # version and sizes tell enough, and are the same on every machine
            is_named=False,
        )
        for path in _walk(root, (".py",), skipped_folders=_STDLIB_SKIPPED_FOLDERS)
    ]
    if not files:
        raise DataError(f"data.source='{STDLIB_SOURCE}': no .py files under {root}; give a text file or folder")
    return files


def _walk(root: Path, suffixes: tuple[str, ...], skipped_folders: frozenset[str] = frozenset()) -> list[Path]:
    found: list[Path] = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if not name.startswith(".") and name not in skipped_folders]
        found += [Path(folder, name) for name in names if not name.startswith(".") and name.lower().endswith(suffixes)]
    files = [path for path in found if path.is_file()]  # a broken link is no file
    return sorted(files, key=lambda path: path.relative_to(root).as_posix())


def _describe_file(path: Path, *, is_named: bool) -> CorpusFile:
    status = path.stat()
    return CorpusFile(path, str(path.resolve()), status.st_size, status.st_mtime_ns, is_named)


def _read_file(file: CorpusFile, text_key: str, max_chars: int) -> Iterator[tuple[str, bool]]:
    try:
        if file.path.suffix.lower() == ".jsonl":
            for text in _read_jsonl(file.path, text_key):
                yield from _split_passages(io.StringIO(text, newline=""), max_chars)
            return
        if not file.is_named and not _is_utf8(file.path):
            logger.warning("%s is not UTF-8 text and is left out", file.path)
            return
        with file.path.open(encoding="utf-8-sig") as stream:
            yield from _split_passages(stream, max_chars)
    except UnicodeDecodeError as error:
        raise DataError(
            f"{file.path}: not UTF-8 text ({_find_wrong_byte(file.path)}); convert it, as with "
            f"'iconv -f latin1 -t utf-8', or take it out of data.source"
        ) from error
    except OSError as error:
        raise DataError(f"{file.path}: cannot be read: {error.strerror or error}") from error


def _find_wrong_byte(path: Path) -> str:
    """Value and place of the first byte of a file that is not UTF-8."""
    line, column, offset, rest = 1, 1, 0, b""
    with path.open("rb") as stream:
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


def _split_passages(stream: TextIO, max_chars: int) -> Iterator[tuple[str, bool]]:
    """Yield `(text, is_last)`, with `max_chars` to twice as many characters, split at line ends if there are any."""

    def read_passage() -> str:
        text = stream.read(max_chars)
        return text if text.endswith("\n") or len(text) < max_chars else text + stream.readline(max_chars)

    text = read_passage()
    while text:
        following = read_passage()
        yield text, not following
        text = following


def _read_jsonl(path: Path, text_key: str) -> Iterator[str]:
    with path.open("rb") as stream:
        for line_number, line in enumerate(stream, start=1):
            if not line.strip():
                continue
            place = f"{path}:{line_number}"
            try:
                row = parse_json(line.decode("utf-8-sig"))
            except ValueError as error:  # both of undecodable bytes and of malformed JSON
                rule = f"not a JSON object on one line ({error}); correct or delete the line"
                raise DataError(f"{place}: {rule}") from error
            if not isinstance(row, dict):
                rule = f'each must be an object such as {{"{text_key}": "..."}}'
                raise DataError(f"{place}: the line is {_json_type(row)}, and {rule}")
            if text_key not in row:
                keys = ", ".join(repr(show(key)) for key in list(row)[:8]) or "no key"
                raise DataError(
                    f"{place}: no key {text_key!r} (the line has {keys}); set data.text_key to the one with the text"
                )
            text = row[text_key]
            if not isinstance(text, str):
                raise DataError(
                    f"{place}: key {text_key!r} holds {_json_type(text)}, not a string; "
                    "set data.text_key to the key with the text"
                )
            # JSON can write half of a surrogate pair, which is no character and has no UTF-8 form.
            yield text.encode("utf-8", "surrogatepass").decode("utf-8", "replace")


def _json_type(value: object) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")


def _is_utf8(path: Path) -> bool:
    try:
        with path.open(encoding="utf-8") as stream:
            while stream.read(1 << 20):
                pass
    except UnicodeDecodeError:
        return False
    return True
