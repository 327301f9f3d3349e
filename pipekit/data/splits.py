"""From the documents of a source to its two token files: training and held-out, written on all cores, resumable.

Of conversations, a loss mask lies beside each.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import islice
from pathlib import Path

from pydantic import BaseModel, TypeAdapter, ValidationError

from pipekit.data.build_once import PROGRESS_FILE
from pipekit.data.conversations import ConversationFormat
from pipekit.data.corpus import Corpus, Passage, read_conversations, read_passages, read_token_ids
from pipekit.data.encode import encode_in_order
from pipekit.data.encoder import Encoded
from pipekit.data.megatron import IndexedTokensWriter, TokenArray, WriterState
from pipekit.data.samples.loss_mask import MaskedTokensWriter
from pipekit.data.tokenizer import TextTokenizer
from pipekit.errors import DataError
from pipekit.files import write_atomically
from pipekit.progress import ProgressCallback
from pipekit.rng import fold_seed

logger = logging.getLogger(__name__)

Batch = list[tuple[Passage, bool]]
"""Passages, and whether each is held out."""

TRAIN_FILE, VALIDATION_FILE = "train.bin", "validation.bin"
_BATCH_BYTES = 2 << 20
# Of text, between states that are saved: what a kill costs.
_PIECE_BYTES = 32 << 20
# Starting processes takes longer than encoding less in this one.
_MIN_PARALLEL_BYTES = 8 << 20


@dataclass(frozen=True)
class SourceData:
    """The documents of a source that are read, and the fraction of them that is held out.

    `shown` is the source as messages name it; `conversations` is the format of its records, None for text; `limit`
    counts documents, `max_bytes` bytes of text.
    """

    corpus: Corpus
    shown: str
    text_key: str
    conversations: ConversationFormat | None
    limit: int | None
    max_bytes: int | None
    validation_fraction: float

    @property
    def identity(self) -> dict[str, object]:
        """All that its text depends on, without having read it."""
        return {
            **({} if self.conversations is None else {"conversations": self.conversations}),
            "files": self.corpus.identity,
            "text_key": self.text_key,
            "limit": self.limit,
            "max_bytes": self.max_bytes,
            "validation_fraction": self.validation_fraction,
        }

    @property
    def num_bytes(self) -> int:
        """Number of bytes of text, as far as it is known without reading."""
        return self.corpus.num_bytes if self.max_bytes is None else min(self.corpus.num_bytes, self.max_bytes)

    def read_passages(self) -> Iterator[tuple[Passage, bool]]:
        """Yield the passages of the text, or the conversations, and whether each is held out."""
        num_documents = 0
        if self.conversations is None:
            passages = read_passages(self.corpus, text_key=self.text_key, max_bytes=self.max_bytes)
        else:
            passages = read_conversations(self.corpus, max_bytes=self.max_bytes)
        for index, passage in enumerate(passages):
            if num_documents == self.limit:
                return
            yield passage, is_held_out(index, self.validation_fraction)
            num_documents += passage.ends_document


class SplitsMeta(BaseModel, frozen=True):
    """Numbers of documents and bytes in the token files of a source. `fingerprint` is the hash of all tokens."""

    num_documents: int
    num_text_bytes: int
    fingerprint: str


def write_splits(
    folder: Path,
    data: SourceData,
    tokenizer: TextTokenizer,
    tokenizer_path: Path,
    *,
    num_cores: int,
    timeout_s: float,
    report: ProgressCallback,
) -> SplitsMeta:
    """Write the token files of a source into a folder; go on where an earlier writer ended there.

    Raises:
        DataError: if the source cannot be read, or is empty, or a record is no conversation; it names the place.
    """
    try:
        return _SplitsWriter(folder, data, tokenizer, report).write(tokenizer_path, num_cores, timeout_s)
    except _BrokenProgressError as error:
        logger.warning("what was prepared in %s is broken and is prepared again: %s", folder, error)
        for path in folder.iterdir():
            path.unlink()
        return _SplitsWriter(folder, data, tokenizer, report).write(tokenizer_path, num_cores, timeout_s)


def is_held_out(index: int, fraction: float) -> bool:
    """True if passage `index` of a corpus belongs to the validation split.

    Of every `1 / fraction` passages in a row one is held out, at a place drawn from a hash. So the share held out is
    near `fraction` even in a small corpus, every passage has the same chance whatever its length, and the
    choice never changes.

    Example:
        >>> sum(is_held_out(index, 0.05) for index in range(1000))
        50
    """
    if fraction > 0.5:
        return not is_held_out(index, 1.0 - fraction)
    if fraction <= 0:
        return False
    first, last = max(0, int(index * fraction) - 1), int((index + 1) * fraction) + 1
    return index in [int((stratum + _draw_place(stratum)) / fraction) for stratum in range(first, last + 1)]


@lru_cache(maxsize=1024)
def _draw_place(stratum: int) -> float:
    return fold_seed(0, "held out", stratum) / 2**63


class _BrokenProgressError(DataError):
    """Files of an earlier writer that cannot be gone on with."""


@dataclass
class _Progress:
    """Progress of the writing of a source."""

    num_passages: int = 0
    num_bytes: int = 0
    num_documents: int = 0
    unfinished: str | None = None
    """File whose last document goes on."""

    writers: dict[str, WriterState] = field(default_factory=dict)


class _SplitsWriter:
    def __init__(self, folder: Path, data: SourceData, tokenizer: TextTokenizer, report: ProgressCallback) -> None:
        self._data, self._report = data, report
        self._message = "encoding the text" if data.conversations is None else "encoding the conversations"
        self._end_token_id, self._vocab_size = tokenizer.end_token_id, tokenizer.vocab_size
        self._progress_path = folder / PROGRESS_FILE
        self._progress = self._load_progress()
        names = (TRAIN_FILE, VALIDATION_FILE) if data.validation_fraction > 0 else (TRAIN_FILE,)
        writer = IndexedTokensWriter if data.conversations is None else MaskedTokensWriter
        self._writers = {
            name: writer(folder / name, vocab_size=self._vocab_size, state=self._progress.writers.get(name))
            for name in names
        }

    def _load_progress(self) -> _Progress:
        try:
            return TypeAdapter(_Progress).validate_json(self._progress_path.read_bytes())
        except FileNotFoundError:
            return _Progress()
        except ValidationError as error:
            raise _BrokenProgressError(f"{self._progress_path}: {error}") from error

    def write(self, tokenizer_path: Path, num_cores: int, timeout_s: float) -> SplitsMeta:
        data, progress = self._data, self._progress
        with ExitStack() as stack:
            try:
                for writer in self._writers.values():
                    stack.enter_context(writer)
            except DataError as error:
                raise _BrokenProgressError(str(error)) from error
            saved_bytes = progress.num_bytes
            self._tell()
            for batch, encoded in self._read_encoded(tokenizer_path, num_cores, timeout_s):
                begin = 0
                for (passage, held_out), length in zip(batch, encoded.lengths, strict=True):
                    name = VALIDATION_FILE if held_out else TRAIN_FILE
                    self._write_passage(name, passage, encoded, slice(begin, begin + length))
                    begin += length
                if progress.num_bytes - saved_bytes >= _PIECE_BYTES:
                    self._save_progress()
                    saved_bytes = progress.num_bytes
                self._tell()
            if progress.num_documents == 0:
                what = "text" if data.conversations is None else "conversation"
                raise DataError(f"{data.shown} holds no {what}; give files that are not empty")
            if progress.unfinished is not None:
                self._writers[progress.unfinished].end_document(self._end_token_id)
            self._report(self._message, 1.0)
            fingerprints = " ".join(writer.fingerprint for writer in self._writers.values())
        self._progress_path.unlink(missing_ok=True)
        return SplitsMeta(
            num_documents=progress.num_documents,
            num_text_bytes=progress.num_bytes,
            fingerprint=hashlib.blake2b(fingerprints.encode(), digest_size=16).hexdigest(),
        )

    def _read_encoded(self, tokenizer_path: Path, num_cores: int, timeout_s: float) -> Iterator[tuple[Batch, Encoded]]:
        data, first = self._data, self._progress.num_passages
        if data.corpus.token_files:
            return islice(_read_encoded_files(data, self._vocab_size), first, None)
        return encode_in_order(
            _batches(islice(data.read_passages(), first, None)),
            tokenizer_path,
            parts_of=lambda batch: [(passage.record or passage.text, passage.ends_document) for passage, _ in batch],
            conversations=data.conversations,
            num_cores=num_cores if data.num_bytes >= _MIN_PARALLEL_BYTES else 1,
            timeout_s=timeout_s,
        )

    def _write_passage(self, name: str, passage: Passage, encoded: Encoded, place: slice) -> None:
        progress = self._progress
        if progress.unfinished not in (None, name):
            self._writers[progress.unfinished].end_document(self._end_token_id)  # the rest goes to the other split
        writer = self._writers[name]
        if isinstance(writer, MaskedTokensWriter):
            writer.write(encoded.token_ids[place], None if encoded.is_learned is None else encoded.is_learned[place])
        else:
            writer.write(encoded.token_ids[place])
        if passage.ends_document:
            writer.end_document()
        progress.unfinished = None if passage.ends_document else name
        progress.num_passages += 1
        progress.num_bytes += passage.num_bytes
        progress.num_documents += passage.ends_document

    def _save_progress(self) -> None:
        self._progress.writers = {name: writer.save_state() for name, writer in self._writers.items()}
        write_atomically(self._progress_path, TypeAdapter(_Progress).dump_json(self._progress))

    def _tell(self) -> None:
        progress, data = self._progress, self._data
        fractions = [progress.num_bytes / data.num_bytes if data.num_bytes else 0.0]
        if data.limit is not None:
            fractions.append(progress.num_documents / data.limit)
        self._report(self._message, min(1.0, max(fractions)))


def _read_encoded_files(data: SourceData, vocab_size: int) -> Iterator[tuple[Batch, Encoded]]:
    """The documents of token files, each as a batch."""
    for index, token_ids in enumerate(islice(read_token_ids(data.corpus), data.limit)):
        check_token_ids(token_ids, vocab_size, shown=data.shown)
        passage = Passage(text="", num_bytes=token_ids.nbytes, ends_document=True)
        yield [(passage, is_held_out(index, data.validation_fraction))], Encoded(token_ids, [token_ids.size])


def check_token_ids(token_ids: TokenArray, vocab_size: int, *, shown: str) -> None:
    """Check that token ids are those of a tokenizer with `vocab_size` ids; a DataError names one that is not."""
    for token_id in (int(token_ids.min(initial=0)), int(token_ids.max(initial=0))):
        if not 0 <= token_id < vocab_size:
            raise DataError(
                f"{shown} holds the token id {token_id}, and those of data.tokenizer are 0 to {vocab_size - 1}; give "
                "the tokenizer with which the files were made"
            )


def _batches(passages: Iterable[tuple[Passage, bool]]) -> Iterator[Batch]:
    batch: Batch = []
    num_bytes = 0
    for passage, held_out in passages:
        batch.append((passage, held_out))
        num_bytes += passage.num_bytes
        if num_bytes >= _BATCH_BYTES:
            yield batch
            batch, num_bytes = [], 0
    if batch:
        yield batch
