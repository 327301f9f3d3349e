"""Encoders of documents: batches of texts, or of records of conversations, to token ids."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple, cast

import numpy as np
import numpy.typing as npt

from pipekit.data.conversations import ConversationEncoder, ConversationFormat
from pipekit.data.megatron import TokenArray
from pipekit.data.sources.formats import Record
from pipekit.data.tokenizer import TextTokenizer, load_tokenizer
from pipekit.errors import DataError

Part = tuple[str | Record, bool]
"""Text, and whether its document ends with it; or the record of a conversation, which is a whole document."""


class Encoded(NamedTuple):
    """Token ids of several parts.

    Attributes:
        token_ids: of one part after the other `(N,)`.
        lengths: number of tokens of each part.
        is_learned: whether each token counts in the loss `(N,)`; None of text, where all do.
    """

    token_ids: TokenArray
    lengths: list[int]
    is_learned: npt.NDArray[np.bool_] | None = None


def build_encoder(
    tokenizer_path: Path, conversations: ConversationFormat | None
) -> Callable[[Sequence[Part]], Encoded]:
    """Return the function that encodes parts: texts, or where a format is given, the records of conversations.

    It raises a DataError if the tokenizer does not know a text, or a record is none of the format.

    Raises:
        DataError: if the tokenizer cannot be read, or has no chat template that can be.
    """
    tokenizer = load_tokenizer(tokenizer_path)
    if conversations is None:
        return lambda parts: _encode_texts(tokenizer, cast(Sequence[tuple[str, bool]], parts))
    encoder = ConversationEncoder(tokenizer_path, conversations)
    return lambda parts: _encode_records(encoder, tokenizer.vocab_size, [cast(Record, part) for part, _ in parts])


def _encode_texts(tokenizer: TextTokenizer, parts: Sequence[tuple[str, bool]]) -> Encoded:
    """Token ids of parts of documents, with the end token after each that ends one."""
    token_ids, lengths = array("i"), []
    for (_, ends), ids in zip(parts, tokenizer.encode_batch([text for text, _ in parts]), strict=True):
        if ends:
            ids.append(tokenizer.end_token_id)
        token_ids.fromlist(ids)
        lengths.append(len(ids))
    return Encoded(np.frombuffer(token_ids, np.int32), lengths)


def _encode_records(encoder: ConversationEncoder, vocab_size: int, records: Sequence[Record]) -> Encoded:
    encoded = [encoder.encode(record) for record in records]
    for record, (ids, _) in zip(records, encoded, strict=True):
        if ids.size and ids.max() >= vocab_size:
            raise DataError(
                f"{record.place}: the chat template gives the token {int(ids.max())}, and the tokenizer.json has "
                f"{vocab_size}; save the tokenizer anew with transformers"
            )
    token_ids, is_learned = (np.concatenate([each[part] for each in encoded]) for part in (0, 1))
    return Encoded(token_ids, [ids.size for ids, _ in encoded], is_learned)
