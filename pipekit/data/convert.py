"""Prepared tokens as files of one's own: in Megatron's format, or decoded as JSON lines."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path

from pipekit.data.megatron import (
    INDEX_SUFFIX,
    TOKENS_SUFFIX,
    IndexedTokens,
    IndexedTokensWriter,
    TokenArray,
    TokenSlice,
)
from pipekit.data.tokenizer import TextTokenizer
from pipekit.errors import DataError
from pipekit.progress import ProgressCallback
from pipekit.storage import storing

JSON_LINES_SUFFIX = ".jsonl"


def check_out(out: Path, *, overwrite: bool) -> list[Path]:
    """Return the files that `convert_tokens` writes.

    Raises:
        DataError: if the name has another suffix, or one of them is there.
    """
    if out.suffix not in (TOKENS_SUFFIX, JSON_LINES_SUFFIX):
        raise DataError(
            f"{out}: the name decides the format; give one that ends in {TOKENS_SUFFIX} for Megatron's, or in "
            f"{JSON_LINES_SUFFIX} for text"
        )
    files = [out, out.with_suffix(INDEX_SUFFIX)] if out.suffix == TOKENS_SUFFIX else [out]
    for file in files:
        if file.exists() and not overwrite:
            raise DataError(f"{file}: is there already; give another name, or replace it with --overwrite")
    return files


def convert_tokens(
    slices: Sequence[TokenSlice], tokenizer: TextTokenizer, out: Path, *, text_key: str, report: ProgressCallback
) -> int:
    """Write the documents of all slices, one slice after the other, into files of the format that `out` names.

    The files get their names when they are complete. Text loses the token that ends each document.

    Returns:
        The number of documents.

    Raises:
        DataError: if a slice is broken.
        StorageError: if the files cannot be written.
    """
    num_documents = sum(part.num_documents for part in slices)

    def documents() -> Iterator[TokenArray]:
        done = 0
        for part in slices:
            for token_ids in IndexedTokens(part.path).documents(part.first_document, part.num_documents):
                if done % 1000 == 0:
                    report("converting", done / num_documents)
                yield token_ids
                done += 1
        report("converting", 1.0)

    with storing(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        if out.suffix == TOKENS_SUFFIX:
            with IndexedTokensWriter(out, vocab_size=tokenizer.vocab_size) as writer:
                for token_ids in documents():
                    writer.write(token_ids)
                    writer.end_document()
        else:
            temporary = out.with_name(f".{out.name}.{uuid.uuid4().hex}.tmp")
            try:
                with temporary.open("w", encoding="utf-8") as lines:
                    for token_ids in documents():
                        ids = token_ids.tolist()
                        if ids and ids[-1] == tokenizer.end_token_id:
                            ids.pop()
                        text = tokenizer.decode(ids, skip_special_tokens=False)
                        lines.write(json.dumps({text_key: text}, ensure_ascii=False) + "\n")
                temporary.replace(out)
            finally:
                temporary.unlink(missing_ok=True)
    return num_documents
