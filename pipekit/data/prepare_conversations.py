"""From records of conversations to a token file, and a loss mask beside it."""

from __future__ import annotations

import hashlib
from contextlib import ExitStack
from itertools import islice
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt

from pipekit.data.conversations import ConversationEncoder, ConversationFormat, find_conversation_format
from pipekit.data.corpus import Corpus, read_records
from pipekit.data.megatron import IndexedTokensWriter
from pipekit.data.samples.loss_mask import mask_path
from pipekit.data.sources.formats import RecordFormat
from pipekit.data.splits import TRAIN_FILE, VALIDATION_FILE, SourceData, SplitsMeta, is_held_out
from pipekit.data.tokenizer import load_tokenizer
from pipekit.errors import DataError
from pipekit.progress import ProgressCallback


class ConversationWriter:
    """Write conversations into a token file and its loss mask; use it as a context manager.

    Args:
        path: the `.bin` file.
        vocab_size: ids are below it.
    """

    def __init__(self, path: Path, *, vocab_size: int) -> None:
        self._tokens = IndexedTokensWriter(path, vocab_size=vocab_size)
        self._mask_path = mask_path(path)
        self._hash = hashlib.blake2b(digest_size=16)

    def __enter__(self) -> ConversationWriter:
        with ExitStack() as stack:
            stack.enter_context(self._tokens)
            self._mask = stack.enter_context(self._mask_path.open("wb"))
            self._stack = stack.pop_all()
        return self

    def write(self, token_ids: npt.NDArray[np.int64], is_learned: npt.NDArray[np.bool_]) -> None:
        """Append a conversation: its token ids `(N,)`, and whether each counts in the loss `(N,)`."""
        self._tokens.write(token_ids)
        self._tokens.end_document()
        data = is_learned.astype(np.uint8).tobytes()
        self._hash.update(data)
        self._mask.write(data)

    @property
    def fingerprint(self) -> str:
        """The hash of all that was written so far."""
        return f"{self._tokens.fingerprint}{self._hash.hexdigest()}"

    def __exit__(self, *failure: object) -> None:
        self._stack.__exit__(*failure)  # type: ignore[arg-type]


def find_conversations(
    corpus: Corpus, format: Literal["auto", "text", "chat", "completion"], *, text_key: str
) -> ConversationFormat | None:
    """Format of the conversations that a corpus holds, as configured or told by its first record; None for text.

    Raises:
        DataError: if conversations are configured, and the corpus has no records.
    """
    if format == "text" or corpus.token_files:
        return None
    if format != "auto":
        return format
    if not all(isinstance(file.format, RecordFormat) for file in corpus.files):
        return None
    first = next(read_records(corpus), None)
    return None if first is None else find_conversation_format(first, text_key=text_key)


def write_conversations(
    folder: Path, data: SourceData, format: ConversationFormat, tokenizer_path: Path, *, report: ProgressCallback
) -> SplitsMeta:
    """Write the conversations of a source into token files and loss masks, for training and held out, in a folder.

    Args:
        folder: for the files.
        data: records of the format.
        format: what the records are.
        tokenizer_path: the `tokenizer.json`, beside its settings.
        report: called with the progress.

    Raises:
        DataError: if a record is none of the format; it names its place.
    """
    encoder = ConversationEncoder(tokenizer_path, format)
    vocab_size = load_tokenizer(tokenizer_path).vocab_size
    fraction = data.validation_fraction
    names = (TRAIN_FILE, VALIDATION_FILE) if fraction > 0 else (TRAIN_FILE,)
    number = num_bytes = 0
    with ExitStack() as stack:
        writers = [stack.enter_context(ConversationWriter(folder / name, vocab_size=vocab_size)) for name in names]
        for index, record in enumerate(islice(read_records(data.corpus), data.limit)):
            num_bytes += len(str(dict(record.fields)).encode("utf-8", "replace"))
            if data.max_bytes is not None and num_bytes > data.max_bytes:
                break
            if index % 1000 == 0:
                report("encoding the conversations", min(1.0, num_bytes / max(1, data.num_bytes)))
            token_ids, is_learned = encoder.encode(record)
            if token_ids.size and token_ids.max() >= vocab_size:
                raise DataError(
                    f"{record.place}: the chat template gives the token {int(token_ids.max())}, and the tokenizer.json "
                    f"has {vocab_size}; save the tokenizer anew with transformers"
                )
            writers[-1 if is_held_out(index, fraction) else 0].write(token_ids, is_learned)
            number += 1
        if not number:
            raise DataError(f"{data.shown} holds no conversation; give files that are not empty")
        fingerprints = " ".join(writer.fingerprint for writer in writers)
    report("encoding the conversations", 1.0)
    return SplitsMeta(
        num_documents=number,
        num_text_bytes=num_bytes,
        fingerprint=hashlib.blake2b(fingerprints.encode(), digest_size=16).hexdigest(),
    )
