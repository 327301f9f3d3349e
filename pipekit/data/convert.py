"""Prepared tokens as files of one's own: in Megatron's format with their loss masks, or decoded as JSON lines."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import numpy.typing as npt

from pipekit.data.megatron import (
    INDEX_SUFFIX,
    TOKENS_SUFFIX,
    IndexedTokensWriter,
    TokenArray,
    TokenSlice,
)
from pipekit.data.prepared import PreparedSource
from pipekit.data.samples.loss_mask import MaskedTokensWriter, load_loss_mask, mask_path
from pipekit.data.tokenizer import TextTokenizer
from pipekit.errors import DataError
from pipekit.progress import ProgressCallback
from pipekit.storage import storing

JSON_LINES_SUFFIX = ".jsonl"


def check_out(out: Path, *, overwrite: bool) -> None:
    """Check that `convert_tokens` may write its files.

    Raises:
        DataError: if the name has another suffix, or one of them is there.
    """
    if out.suffix not in (TOKENS_SUFFIX, JSON_LINES_SUFFIX):
        raise DataError(
            f"{out}: the name decides the format; give one that ends in {TOKENS_SUFFIX} for Megatron's, or in "
            f"{JSON_LINES_SUFFIX} for text"
        )
    for name in (out, held_out_path(out)):
        more = [name.with_suffix(INDEX_SUFFIX), mask_path(name)] if out.suffix == TOKENS_SUFFIX else []
        for file in (name, *more):
            if file.exists() and not overwrite:
                raise DataError(f"{file}: is there already; give another name, or replace it with --overwrite")


def held_out_path(out: Path) -> Path:
    """Path of the file of held-out documents beside that of the training documents."""
    return out.with_name(f"{out.stem}-validation{out.suffix}")


def convert_tokens(
    sources: Sequence[PreparedSource], tokenizer: TextTokenizer, out: Path, *, text_key: str, report: ProgressCallback
) -> dict[Path, int]:
    """Write the training documents of sources, one source after the other, in the format that the name of `out` tells.

    Documents that are held out go into files of their own, by `held_out_path`. In Megatron's format a loss mask lies
    beside each file if any source has one. The files get their names when they are complete. Text loses the token that
    ends each document.

    Returns:
        The number of documents in each file.

    Raises:
        DataError: if a token file is broken, or JSON lines would lose a loss mask.
        StorageError: if the files cannot be written.
    """
    has_mask = any(source.has_loss_mask for source in sources)
    if has_mask and out.suffix == JSON_LINES_SUFFIX:
        raise DataError(
            f"{out}: the data are conversations, and lines of text do not say which tokens count in the loss; give a "
            f"name that ends in {TOKENS_SUFFIX}, beside which a loss mask is written"
        )
    files = {
        out: [(source.train, source.has_loss_mask) for source in sources],
        held_out_path(out): [(each.validation, each.has_loss_mask) for each in sources if each.validation is not None],
    }
    num_documents = {file: sum(part.num_documents for part, _ in parts) for file, parts in files.items() if parts}
    done = 0
    with storing(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        for file in num_documents:

            def documents(file: Path = file) -> Iterator[tuple[TokenArray, npt.NDArray[np.bool_] | None]]:
                nonlocal done
                for part, is_masked in files[file]:
                    for document in _read_documents(part, is_masked=is_masked):
                        if done % 1000 == 0:
                            report("converting", done / sum(num_documents.values()))
                        yield document
                        done += 1

            if out.suffix == JSON_LINES_SUFFIX:
                _write_lines(file, (token_ids for token_ids, _ in documents()), tokenizer, text_key)
            elif has_mask:
                with MaskedTokensWriter(file, vocab_size=tokenizer.vocab_size) as masked:
                    for token_ids, is_learned in documents():
                        masked.write(token_ids, is_learned)
                        masked.end_document()
            else:
                mask_path(file).unlink(missing_ok=True)  # of another file, which this one takes the place of
                with IndexedTokensWriter(file, vocab_size=tokenizer.vocab_size) as writer:
                    for token_ids, _ in documents():
                        writer.write(token_ids)
                        writer.end_document()
    report("converting", 1.0)
    return num_documents


def _read_documents(part: TokenSlice, *, is_masked: bool) -> Iterator[tuple[TokenArray, npt.NDArray[np.bool_] | None]]:
    tokens, mask = part.load_tokens(), load_loss_mask(part) if is_masked else None
    for begin, end in pairwise(part.load_bounds().tolist()):
        yield tokens[begin:end], None if mask is None else mask[begin:end].astype(np.bool_)


def _write_lines(file: Path, documents: Iterator[TokenArray], tokenizer: TextTokenizer, text_key: str) -> None:
    temporary = file.with_name(f".{file.name}.{uuid.uuid4().hex}.tmp")
    try:
        with temporary.open("w", encoding="utf-8") as lines:
            for token_ids in documents:
                ids = token_ids.tolist()
                if ids and ids[-1] == tokenizer.end_token_id:
                    ids.pop()
                text = tokenizer.decode(ids, skip_special_tokens=False)
                lines.write(json.dumps({text_key: text}, ensure_ascii=False) + "\n")
        temporary.replace(file)
    finally:
        temporary.unlink(missing_ok=True)
