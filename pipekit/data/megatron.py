"""Megatron's indexed token files: token ids in a `.bin` file, documents in an `.idx` file, both memory-mapped.

The `.bin` file holds the ids of all documents, one after the other. The `.idx` file holds, little-endian, for `n`
sequences and `d` documents:

| bytes | content |
|---|---|
| 9 | `MMIDIDX` and two zero bytes |
| 8 | version 1 |
| 1 | code of the type of a token id |
| 8 | `n` |
| 8 | `d + 1` |
| 4 n | tokens of each sequence |
| 8 n | where each sequence begins in the `.bin` file, in bytes |
| 8 (d + 1) | index of the first sequence of each document, and at the end `n` |

A document is one sequence, or several where it has more tokens than 4 bytes count.

Source: Megatron-LM, megatron/core/datasets/indexed_dataset.py.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import shutil
import struct
import weakref
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Literal

import numpy as np
import numpy.typing as npt
import xxhash
from pydantic import BaseModel

from pipekit.errors import DataError
from pipekit.files import sync_folder

TokenArray = npt.NDArray[np.integer[Any]]
TOKENS_SUFFIX, INDEX_SUFFIX = ".bin", ".idx"
MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")
_VERSION = 1
_CODES = {"uint8": 1, "int8": 2, "int16": 3, "int32": 4, "int64": 5, "uint16": 8}
_MAX_SEQUENCE_TOKENS = 1 << 30
_CHUNK = 1 << 16  # numbers that are read or written at a time
_NUM_CHECKED = 4096
_BLOCK_BYTES, _NUM_BLOCKS = 1 << 20, 256


class TokenSlice(BaseModel, frozen=True):
    """Documents `[first_document, first_document + num_documents)` of an indexed token file.

    `path` is the `.bin` file, of `num_file_bytes` bytes, and `num_tokens` the number of the tokens of the documents.
    """

    path: Path
    first_document: int
    num_documents: int
    num_tokens: int
    num_file_bytes: int

    @property
    def file_sizes(self) -> dict[Path, int | None]:
        """The files that are read, with their bytes; None where the number is not known."""
        return {self.path: self.num_file_bytes, self.path.with_suffix(INDEX_SUFFIX): None}

    def load_tokens(self) -> TokenArray:
        """Return the tokens `(num_tokens,)`, memory-mapped and read-only.

        Raises:
            DataError: if the file is missing or broken, or is not the one that the slice was made of.
        """
        file = IndexedTokens(self.path)
        first, end = self.first_document, self.first_document + self.num_documents
        if end <= file.num_documents:
            tokens = file.tokens[file.begin(first) : file.begin(end)]
            if len(tokens) == self.num_tokens:
                return tokens
        raise DataError(
            f"{self.path}: has changed since it was prepared: documents {first} to {end - 1} no longer have "
            f"{self.num_tokens:,} tokens; start again with the file as it is"
        )

    def load_bounds(self) -> npt.NDArray[np.int64]:
        """Return where each document begins in the tokens, and where the last one ends `(num_documents + 1,)`."""
        bounds = IndexedTokens(self.path).bounds(self.first_document, self.num_documents)
        bounds -= bounds[0]
        return bounds


class TokenReader:
    """Reads tokens of a slice by their place in it. The file is not mapped: memory is that of the tokens that are read.

    `num_tokens` are the tokens of the slice. It may be used by several threads, and in a fork.

    Raises:
        DataError: as `TokenSlice.load_tokens`.
    """

    def __init__(self, token_slice: TokenSlice) -> None:
        tokens = token_slice.load_tokens()
        self.num_tokens, self._path, self._dtype = len(tokens), token_slice.path, tokens.dtype
        self._begin = IndexedTokens(token_slice.path).begin(token_slice.first_document)
        self._descriptor = os.open(token_slice.path, os.O_RDONLY)
        weakref.finalize(self, os.close, self._descriptor)

    def read(self, first: int, count: int) -> npt.NDArray[np.int64]:
        """Return the tokens `(count,)` from place `first` on.

        Raises:
            DataError: if the file has become shorter.
        """
        size = self._dtype.itemsize
        data = os.pread(self._descriptor, count * size, (self._begin + first) * size)
        if len(data) < count * size:
            raise DataError(f"{self._path}: has become shorter while it was read; start again with a whole file")
        return np.frombuffer(data, self._dtype).astype(np.int64)


def take_documents(path: str | Path, first_document: int = 0, num_documents: int | None = None) -> TokenSlice:
    """Return a slice of the documents of an indexed token file; by default of all.

    Raises:
        DataError: if the file is missing or broken.
    """
    file = IndexedTokens(path)
    num_documents = file.num_documents - first_document if num_documents is None else num_documents
    assert 0 <= first_document <= first_document + num_documents <= file.num_documents
    return TokenSlice(
        path=file.path,
        first_document=first_document,
        num_documents=num_documents,
        num_tokens=file.begin(first_document + num_documents) - file.begin(first_document),
        num_file_bytes=file.tokens.nbytes,
    )


class IndexedTokens:
    """The tokens and documents of a `.bin` file and the `.idx` file beside it, memory-mapped.

    `tokens` are those of all documents `(N,)`, read-only; `num_documents` counts the documents.

    Args:
        path: the `.bin` file, or its name without the suffix.

    Raises:
        DataError: if one of the files is missing or broken, or their sizes disagree.
    """

    def __init__(self, path: str | Path) -> None:
        given = Path(path)
        self.path = given if given.suffix == TOKENS_SUFFIX else given.with_name(given.name + TOKENS_SUFFIX)
        index_path = self.path.with_suffix(INDEX_SUFFIX)
        try:
            with index_path.open("rb") as stream:
                header = stream.read(_HEADER.size)
            self._num_index_bytes, num_bytes = index_path.stat().st_size, self.path.stat().st_size
        except OSError as error:
            raise DataError(
                f"{error.filename}: cannot be read: {error.strerror}; a .bin file of tokens and its .idx file belong "
                "together, so give both"
            ) from error
        if len(header) < _HEADER.size or not header.startswith(MAGIC):
            raise DataError(f"{index_path}: not an index of Megatron's format, which begins with MMIDIDX")
        _, version, code, self.num_sequences, num_ends = _HEADER.unpack(header)
        names = [name for name, known in _CODES.items() if known == code]
        if version != _VERSION or not names:
            raise DataError(
                f"{index_path}: version {version} of the format, with the type {code} of token ids; version {_VERSION} "
                f"is read, with {', '.join(f'{known} ({name})' for name, known in _CODES.items())}"
            )
        dtype = np.dtype(names[0]).newbyteorder("<")
        self.num_documents = num_ends - 1
        num_expected = _HEADER.size + 12 * self.num_sequences + 8 * num_ends
        if num_ends < 1 or self._num_index_bytes != num_expected:
            raise DataError(
                f"{index_path}: {self._num_index_bytes:,} bytes, but {self.num_sequences:,} sequences in "
                f"{self.num_documents:,} documents take {num_expected:,}; it was cut off, or is one of images, too"
            )
        index = np.memmap(index_path, np.uint8, "r")
        begins, ends = _HEADER.size + 4 * self.num_sequences, _HEADER.size + 12 * self.num_sequences
        self._lengths = index[_HEADER.size : begins].view("<i4")
        self._begins = index[begins:ends].view("<i8")
        self._documents = index[ends:].view("<i8")
        if not self._is_consistent(num_bytes, dtype.itemsize):
            raise DataError(
                f"{index_path}: does not describe {self.path.name}, which has {num_bytes:,} bytes; one of the two was "
                "cut off, or belongs to another file"
            )
        # An empty file cannot be mapped.
        self.tokens: TokenArray = np.memmap(self.path, dtype, "r") if num_bytes else np.empty(0, dtype)

    def _is_consistent(self, num_bytes: int, itemsize: int) -> bool:
        """True if both files belong together, as far as the ends and some places between tell."""
        first, last = (int(self._documents[end]) for end in (0, -1))
        if (first, last) != (0, self.num_sequences):
            return False
        if self.num_sequences == 0:
            return num_bytes == 0
        some = np.unique(np.linspace(0, self.num_sequences - 1, _NUM_CHECKED).astype(np.int64))
        begins, sizes = self._begins[some], self._lengths[some].astype(np.int64) * itemsize
        follows = np.append(self._begins[some[:-1] + 1], num_bytes)
        some = np.unique(np.linspace(0, self.num_documents - 1, _NUM_CHECKED).astype(np.int64))
        documents = self._documents[some]
        are_in_order = (documents >= 0) & (documents <= self._documents[some + 1])
        return bool(begins[0] == 0 and (sizes >= 0).all() and (begins + sizes == follows).all() and are_in_order.all())

    def bounds(self, first: int = 0, num_documents: int | None = None) -> npt.NDArray[np.int64]:
        """Return where documents begin in `tokens`, and where the last of them ends `(num_documents + 1,)`.

        By default those of all documents.
        """
        end = self.num_documents if num_documents is None else first + num_documents
        sequences = self._documents[first : end + 1]
        bounds = np.full(len(sequences), len(self.tokens), np.int64)
        is_begin = sequences < self.num_sequences  # an empty document at the end begins where the tokens end
        bounds[is_begin] = self._begins[sequences[is_begin]] // self.tokens.itemsize
        return bounds

    def begin(self, document: int) -> int:
        """Return where a document begins in `tokens`; for `num_documents`, the number of tokens."""
        return int(self.bounds(document, 0)[0])

    def documents(self, first: int = 0, num_documents: int | None = None) -> Iterator[TokenArray]:
        """Yield the tokens of each document, by default of all."""
        end = self.num_documents if num_documents is None else first + num_documents
        for chunk in range(first, end, _CHUNK):
            bounds = self.bounds(chunk, min(_CHUNK, end - chunk)).tolist()
            for begin, stop in itertools.pairwise(bounds):
                yield self.tokens[begin:stop]


def token_dtype(vocab_size: int) -> Literal["uint16", "int32"]:
    """Return the type in which Megatron writes token ids below `vocab_size`.

    Example:
        >>> token_dtype(50257), token_dtype(128256)
        ('uint16', 'int32')
    """
    return "uint16" if vocab_size < 65500 else "int32"


class WriterState(BaseModel, frozen=True):
    """State of a writer from which another can go on; see `IndexedTokensWriter.save_state`."""

    num_tokens: int
    num_sequences: int
    num_documents: int
    num_open: int
    fingerprint: str


class IndexedTokensWriter:
    """Write a `.bin` file and its `.idx` file piece by piece; use it as a context manager.

    Both get their names when they are complete. Where the block fails, nothing is left, unless a state was saved from
    which another writer can go on. Memory does not grow with the number of documents.

    Args:
        path: the `.bin` file.
        vocab_size: ids are below it; their type follows from it.
        state: of a writer of the same file that ended early.

    Raises:
        DataError: from the context manager, if the files are not as they were when the state was saved.
    """

    def __init__(self, path: str | Path, *, vocab_size: int, state: WriterState | None = None) -> None:
        self.path = Path(path)
        self._vocab_size = vocab_size
        self._dtype = np.dtype(token_dtype(vocab_size)).newbyteorder("<")
        self._hash = hashlib.blake2b(digest_size=16)
        self._state = state
        self.num_tokens = self.num_documents = self._num_sequences = self._num_open = 0
        self._parts: list[npt.NDArray[np.integer[Any]]] = []
        self._num_waiting = 0
        stem = self.path.with_suffix("").name
        self._tokens_path, self._lengths_path, self._ends_path, self._index_path = self._temporary = [
            self.path.with_name(f".{stem}.{kind}.tmp") for kind in ("tokens", "lengths", "ends", "index")
        ]

    def __enter__(self) -> IndexedTokensWriter:
        mode = "wb" if self._state is None else "r+b"
        try:
            self._files = [path.open(mode) for path in self._temporary[:3]]
        except FileNotFoundError as error:
            raise DataError(f"{error.filename}: is missing, and was there when the state was saved") from error
        self._tokens, self._lengths, self._ends = self._files
        if self._state is not None:
            self._go_on(self._state)
        return self

    def _go_on(self, state: WriterState) -> None:
        sizes = (state.num_tokens * self._dtype.itemsize, 4 * state.num_sequences, 8 * state.num_documents)
        are_whole = all(file.seek(0, os.SEEK_END) >= size for file, size in zip(self._files, sizes, strict=True))
        for file, size in zip(self._files, sizes, strict=True):
            file.truncate(size)
        self._tokens.seek(0)
        while data := self._tokens.read(_BLOCK_BYTES):
            self._hash.update(data)
        for file in self._files:
            file.seek(0, os.SEEK_END)
        if not are_whole or self.fingerprint != state.fingerprint:
            for file in self._files:
                file.close()
            raise DataError(f"{self._tokens_path}: is not as it was when the state was saved")
        self.num_tokens, self.num_documents = state.num_tokens, state.num_documents
        self._num_sequences, self._num_open = state.num_sequences, state.num_open

    def write(self, token_ids: npt.NDArray[np.integer[Any]]) -> None:
        """Append token ids, each in `[0, vocab_size)`, to the document that is open."""
        for first in range(0, token_ids.size, _MAX_SEQUENCE_TOKENS):
            part = token_ids[first : first + _MAX_SEQUENCE_TOKENS]
            if self._num_open + part.size > _MAX_SEQUENCE_TOKENS:
                self._end_sequence()
            self._parts.append(part)
            self._num_open += part.size
            self._num_waiting += part.size
            self.num_tokens += part.size
        if self._num_waiting > _BLOCK_BYTES:
            self._write_tokens()

    def _write_tokens(self) -> None:
        if self._parts:
            token_ids = np.concatenate(self._parts)
            assert token_ids.size == 0 or (token_ids.min() >= 0 and token_ids.max() < self._vocab_size)
            data = token_ids.astype(self._dtype).tobytes()
            self._hash.update(data)
            self._tokens.write(data)
            self._parts, self._num_waiting = [], 0

    def end_document(self, end_token_id: int | None = None) -> None:
        """End the document that is open, with the token that ends one if it is given."""
        if end_token_id is not None:
            self.write(np.array([end_token_id]))
        self._end_sequence()
        self._ends.write(struct.pack("<q", self._num_sequences))
        self.num_documents += 1

    def _end_sequence(self) -> None:
        self._lengths.write(struct.pack("<i", self._num_open))
        self._num_sequences += 1
        self._num_open = 0

    @property
    def fingerprint(self) -> str:
        """The hash of all tokens written so far."""
        self._write_tokens()
        return self._hash.hexdigest()

    def save_state(self) -> WriterState:
        """Have everything on the disk, and return how far it goes, for a writer that goes on from there."""
        self._state = WriterState(
            num_tokens=self.num_tokens,
            num_sequences=self._num_sequences,
            num_documents=self.num_documents,
            num_open=self._num_open,
            fingerprint=self.fingerprint,
        )
        for file in self._files:
            file.flush()
            os.fsync(file.fileno())
        return self._state

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        is_kept = kind is not None and self._state is not None
        try:
            with self._tokens, self._lengths, self._ends:
                if kind is None:
                    assert self._num_open == 0, "the last document has not ended"
                    self._write_tokens()
                    self._tokens.flush()
                    os.fsync(self._tokens.fileno())
            if kind is None:
                self._write_index()
                self._tokens_path.replace(self.path)
                self._index_path.replace(self.path.with_suffix(INDEX_SUFFIX))
                sync_folder(self.path.parent)
        finally:
            for path in self._temporary if not is_kept else ():
                path.unlink(missing_ok=True)

    def _write_index(self) -> None:
        code = _CODES[self._dtype.name]
        with self._index_path.open("wb") as index:
            index.write(_HEADER.pack(MAGIC, _VERSION, code, self._num_sequences, self.num_documents + 1))
            _copy(self._lengths_path, index)
            begin = 0
            with self._lengths_path.open("rb") as lengths:
                while data := lengths.read(4 * _CHUNK):
                    ends = begin + np.cumsum(np.frombuffer(data, "<i4"), dtype="<i8") * self._dtype.itemsize
                    index.write(np.append(np.array(begin, "<i8"), ends[:-1]).tobytes())
                    begin = int(ends[-1])
            index.write(struct.pack("<q", 0))
            _copy(self._ends_path, index)
            index.flush()
            os.fsync(index.fileno())


def sample_checksum(path: Path) -> str:
    """Return a checksum by which a file that was changed is told from the one that was written.

    That of a file of up to 256 MiB is of all its bytes, and that of a longer one of 256 blocks of 1 MiB, evenly spread,
    so that it takes a fraction of a second: a file that another has come in place of is noticed, whatever its size.
    """
    num_bytes = path.stat().st_size
    stride = max(_BLOCK_BYTES, num_bytes // _NUM_BLOCKS)
    checksum = xxhash.xxh3_128(str(num_bytes).encode())
    with path.open("rb") as stream:
        for begin in range(0, num_bytes, stride):
            stream.seek(begin)
            checksum.update(stream.read(_BLOCK_BYTES))
    return checksum.hexdigest()


def _copy(path: Path, out: BinaryIO) -> None:
    with path.open("rb") as stream:
        shutil.copyfileobj(stream, out)
