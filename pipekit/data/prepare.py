"""From the `data` section of a configuration to token files in the cache.

The cache holds a folder for each tokenizer, and one for each choice of source and tokenizer, named by keys that are
computed without reading the text. Token files in Megatron's format are read where they lie.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from pipekit.config import DataConfig, SourceEntry
from pipekit.data.build_once import build_once
from pipekit.data.conversations import find_conversations
from pipekit.data.corpus import find_corpus
from pipekit.data.megatron import (
    INDEX_SUFFIX,
    TOKENS_SUFFIX,
    IndexedTokens,
    TokenSlice,
    sample_checksum,
    take_documents,
)
from pipekit.data.prepared import PreparedData, PreparedSource
from pipekit.data.samples import choose_packing
from pipekit.data.samples.loss_mask import MASK_SUFFIX, mask_path
from pipekit.data.splits import TRAIN_FILE, VALIDATION_FILE, SourceData, check_token_ids, write_splits
from pipekit.data.tokenizer import (
    SIDE_FILES,
    TOKENIZER_FILE,
    TextTokenizer,
    copy_tokenizer,
    find_tokenizer_file,
    load_tokenizer,
    tokenizer_threads,
    train_tokenizer,
)
from pipekit.errors import DataError
from pipekit.progress import ProgressCallback

logger = logging.getLogger(__name__)

DEFAULT_CACHE_DIR = "~/.cache/pipekit"
TOKENIZER_SAMPLE_BYTES = 8_000_000
_FORMAT_VERSION = 3  # raise it when the same settings would give other tokens
_META_FILE = "meta.json"


def prepare_data(
    config: DataConfig,
    *,
    sequence_length: int,
    timeout_s: float = 600.0,
    on_progress: ProgressCallback | None = None,
    num_cores: int | None = None,
) -> PreparedData:
    """Return the token files of `config`, from the cache or newly made.

    Any number of processes may call this at the same time: one builds, the others wait for it. Who was killed while
    building is gone on from.

    Args:
        config: the `data` section.
        sequence_length: tokens of one sample; both splits must hold at least one. The cache does not depend on it.
        timeout_s: the longest wait for another process that builds, in seconds.
        on_progress: called with what is being done, and the fraction done in `[0, 1]` or None where that is not known.
        num_cores: to encode text on; by default all that this process may use. The tokens do not depend on it.

    Raises:
        DataError: if the text or the tokenizer cannot be read, another process builds for longer than `timeout_s`, or
            a split is shorter than one sample.
        StorageError: if the cache cannot be written.
    """
    preparation = _Preparation(config, timeout_s, on_progress or (lambda message, fraction: None), num_cores)
    prepared = preparation.prepare()
    _check_long_enough(prepared, config, sequence_length)
    return prepared


class _Preparation:
    """One preparation of all sources of a `data` section."""

    def __init__(self, config: DataConfig, timeout_s: float, report: ProgressCallback, num_cores: int | None) -> None:
        self._config, self._timeout_s, self._report = config, timeout_s, report
        self._num_cores = num_cores or len(os.sched_getaffinity(0))
        self._cache = Path(config.cache_dir or DEFAULT_CACHE_DIR).expanduser()

    def prepare(self) -> PreparedData:
        entries = self._config.entries
        sources = {entry.name: self._find_source(entry) for entry in entries}
        self._tokenizer_path = self._prepare_tokenizer(list(sources.values()))
        self._tokenizer = load_tokenizer(self._tokenizer_path)
        prepared = tuple(self._prepare_entry(entry, sources[entry.name]) for entry in entries)
        fingerprints = " ".join(f"{source.fingerprint} {source.validation_fingerprint}" for source in prepared)
        return PreparedData(
            tokenizer_path=self._tokenizer_path,
            vocab_size=self._tokenizer.vocab_size,
            sources=prepared,
            fingerprint=hashlib.blake2b(fingerprints.encode(), digest_size=16).hexdigest(),
        )

    def _find_source(self, entry: SourceEntry, kind: Literal["source", "validation"] = "source") -> SourceData:
        config, text_key = self._config, entry.text_key or self._config.text_key
        shown = _show(config, entry, kind)
        try:
            corpus = find_corpus(getattr(entry, kind))
        except DataError as error:
            raise DataError(str(error).replace("data.source", shown.partition("=")[0])) from error
        return SourceData(
            corpus=corpus,
            shown=shown,
            text_key=text_key,
            conversations=find_conversations(corpus, config.format, text_key=text_key),
            limit=entry.limit if kind == "source" else None,
            max_bytes=config.max_bytes,
            validation_fraction=config.validation_fraction if entry.validation is None else 0.0,
        )

    def _prepare_tokenizer(self, sources: Sequence[SourceData]) -> Path:
        given = self._config.tokenizer
        if given is None:
            for data in sources:
                if data.corpus.token_files:
                    raise DataError(
                        f"{data.shown} holds token ids; set data.tokenizer to the tokenizer with which they were made"
                    )
                if data.conversations is not None:
                    raise DataError(
                        f"{data.shown} holds records of {data.conversations}; set data.tokenizer to the tokenizer of "
                        "the model that you want to train"
                    )
            parts: object = [
                _FORMAT_VERSION,
                self._config.vocab_size,
                TOKENIZER_SAMPLE_BYTES,
                [data.identity for data in sources],
            ]
        else:
            parts = _hash_tokenizer(find_tokenizer_file(given))
        build_once(
            self._cache / "tokenizers" / _key(parts),
            load=_load_cached_tokenizer,
            build=lambda folder: self._build_tokenizer(folder, sources),
            timeout_s=self._timeout_s,
            report=self._report,
        )
        return self._cache / "tokenizers" / _key(parts) / TOKENIZER_FILE

    def _build_tokenizer(self, folder: Path, sources: Sequence[SourceData]) -> None:
        if self._config.tokenizer is not None:
            load_tokenizer(self._config.tokenizer)
            copy_tokenizer(self._config.tokenizer, folder)
            return
        self._report("training the tokenizer", None)
        with tokenizer_threads():
            tokenizer = train_tokenizer(_sample_texts(sources), vocab_size=self._config.vocab_size)
        tokenizer.backend.save(str(folder / TOKENIZER_FILE))

    def _prepare_entry(self, entry: SourceEntry, data: SourceData) -> PreparedSource:
        held_out = None
        if entry.validation is not None:
            held_out = self._find_source(entry, "validation")
            if _has_loss_mask(held_out) != _has_loss_mask(data):
                raise DataError(f"{data.shown} and {held_out.shown}: one holds text, and one conversations")
        train, validation, fingerprint = self._prepare_source(data)
        validation_fingerprint = ""
        if held_out is not None:
            validation, _, validation_fingerprint = self._prepare_source(held_out)
        return PreparedSource(
            name=entry.name,
            train=train,
            validation=validation,
            fingerprint=fingerprint,
            has_loss_mask=_has_loss_mask(data),
            validation_fingerprint=validation_fingerprint,
        )

    def _prepare_source(self, data: SourceData) -> tuple[TokenSlice, TokenSlice | None, str]:
        files = data.corpus.token_files
        if files and data.max_bytes is not None:
            raise DataError(
                f"data.max_bytes={data.max_bytes} counts bytes of text, and {data.shown} holds token ids; read fewer "
                "documents, as with data/tokens#500"
            )
        if len(files) == 1 and files[0].path.suffix == TOKENS_SUFFIX and _has_index(files[0].path):
            return self._read_in_place(data, files[0].path)
        if files and _has_loss_mask(data):
            raise DataError(
                f"{data.shown}: a loss mask is beside one of several token files, and can be read beside a single one "
                "only; give each file as an entry of data.mixture"
            )
        key = _key([_FORMAT_VERSION, data.identity, _hash_tokenizer(self._tokenizer_path)])
        return build_once(
            self._cache / "data" / key,
            load=_load_source,
            build=lambda folder: self._build_source(folder, data),
            timeout_s=self._timeout_s,
            report=self._report,
        )

    def _build_source(self, folder: Path, data: SourceData) -> None:
        meta = write_splits(
            folder,
            data,
            self._tokenizer,
            self._tokenizer_path,
            num_cores=self._num_cores,
            timeout_s=self._timeout_s,
            report=self._report,
        )
        files = sorted(path for path in folder.iterdir() if path.suffix in (TOKENS_SUFFIX, INDEX_SUFFIX, MASK_SUFFIX))
        about = {"source": data.shown, "checksums": {path.name: sample_checksum(path) for path in files}}
        (folder / _META_FILE).write_text(json.dumps(meta.model_dump() | about, indent=2) + "\n", encoding="utf-8")

    def _read_in_place(self, data: SourceData, path: Path) -> tuple[TokenSlice, TokenSlice | None, str]:
        """Slices of a token file of the user's; the last documents are held out."""
        num_documents = min(data.limit or 1 << 62, IndexedTokens(path).num_documents)
        num_held_out = round(data.validation_fraction * num_documents)
        num_train = num_documents - num_held_out
        train = take_documents(path, 0, num_train)
        validation = take_documents(path, num_train, num_held_out) if data.validation_fraction > 0 else None
        _check_tokens(data, train, self._tokenizer)
        files = [*train.file_sizes, *([mask_path(path)] if _has_loss_mask(data) else [])]
        checksums = [sample_checksum(file) for file in files]
        return train, validation, _key([*checksums, num_train, num_held_out])


def _has_loss_mask(data: SourceData) -> bool:
    """True for conversations, and for token files with a loss mask beside them."""
    return data.conversations is not None or any(mask_path(file.path).is_file() for file in data.corpus.token_files)


def _has_index(path: Path) -> bool:
    return path.with_suffix(INDEX_SUFFIX).is_file()


def _check_tokens(data: SourceData, tokens: TokenSlice, tokenizer: TextTokenizer) -> None:
    """Check that token ids belong to a tokenizer, as far as some of them tell."""
    token_ids = tokens.load_tokens()
    blocks = np.linspace(0, max(0, len(token_ids) - 4096), 256).astype(int)
    for begin in blocks:
        check_token_ids(token_ids[begin : begin + 4096], tokenizer.vocab_size, shown=data.shown)
    bounds = tokens.load_bounds()
    if len(bounds) > 1 and bounds[1] > 0 and token_ids[bounds[1] - 1] != tokenizer.end_token_id:
        logger.warning(
            "%s: the first document does not end with %s, the token that ends a document",
            data.shown,
            tokenizer.end_token,
        )


def _load_cached_tokenizer(folder: Path) -> TextTokenizer | None:
    if not folder.is_dir():
        return None
    try:
        return load_tokenizer(folder / TOKENIZER_FILE)
    except DataError as error:
        logger.warning("the cached tokenizer in %s is broken and is made again: %s", folder, error)
        return None


def _load_source(folder: Path) -> tuple[TokenSlice, TokenSlice | None, str] | None:
    """Return the training and held-out tokens of a cache folder, or None if it is missing or incomplete."""
    if not folder.is_dir():
        return None
    try:
        meta = json.loads((folder / _META_FILE).read_text(encoding="utf-8"))
        checksums = dict(meta["checksums"])
        if any(sample_checksum(folder / name) != checksum for name, checksum in checksums.items()):
            raise DataError("its files are not as they were written")
        validation = take_documents(folder / VALIDATION_FILE) if VALIDATION_FILE in checksums else None
        return take_documents(folder / TRAIN_FILE), validation, str(meta["fingerprint"])
    except (OSError, ValueError, TypeError, KeyError, DataError) as error:
        logger.warning("cached data in %s is broken and is made again: %s", folder, error)
        return None


def _sample_texts(sources: Sequence[SourceData]) -> Iterator[str]:
    """Yield training passages, evenly over all sources, of about `TOKENIZER_SAMPLE_BYTES` bytes in all."""
    num_bytes_read = num_bytes_sampled = 0
    share = min(1.0, TOKENIZER_SAMPLE_BYTES / max(1, sum(data.num_bytes for data in sources)))
    for data in sources:
        for passage, held_out in data.read_passages():
            if held_out:
                continue
            num_bytes_read += passage.num_bytes
            if num_bytes_sampled + passage.num_bytes <= share * num_bytes_read:
                num_bytes_sampled += passage.num_bytes
                yield passage.text


def _check_long_enough(prepared: PreparedData, config: DataConfig, sequence_length: int) -> None:
    needed = sequence_length + 1
    sample = f"one sample of train.sequence_length={sequence_length} needs {needed}"
    for entry, source in zip(config.entries, prepared.sources, strict=True):
        if choose_packing(config, has_loss_mask=source.has_loss_mask) != "concat":
            continue
        num_train = source.train.num_tokens
        num_held_out = source.validation.num_tokens if source.validation is not None else needed
        shown = _show(config, entry)
        if num_train < needed:
            wider = "" if config.max_bytes is None else f", raise data.max_bytes={config.max_bytes}"
            raise DataError(
                f"{shown} gives {num_train} training tokens, and {sample}; "
                f"lower train.sequence_length{_at_most(num_train)}{wider}, or give more text"
            )
        if num_held_out < needed and entry.validation is not None:
            raise DataError(
                f"{_show(config, entry, 'validation')} gives {num_held_out} tokens, and {sample}; lower "
                f"train.sequence_length{_at_most(num_held_out)}, or give more text"
            )
        if num_held_out < needed:
            raise DataError(
                f"data.validation_fraction={config.validation_fraction:g} holds out {num_held_out} of "
                f"{num_train + num_held_out} tokens of {shown}, and {sample}; "
                f"raise data.validation_fraction, lower train.sequence_length{_at_most(num_held_out)}, "
                "or set data.validation_fraction=0 to train without validation"
            )


def _at_most(num_tokens: int) -> str:
    return f" to {num_tokens - 1} or less" if num_tokens > 1 else ""


def _hash_tokenizer(path: Path) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for file in (path, *(path.parent / name for name in SIDE_FILES)):
        digest.update(file.read_bytes() if file.is_file() else b"")
        digest.update(b"\0")
    return digest.hexdigest()


def _key(parts: object) -> str:
    return hashlib.blake2b(json.dumps(parts, sort_keys=True).encode(), digest_size=12).hexdigest()


def _show(config: DataConfig, entry: SourceEntry, kind: Literal["source", "validation"] = "source") -> str:
    """Key and value of a source, as a user sets them."""
    value = getattr(entry, kind)
    where = f"data.{kind}" if config.mixture is None else f"data.mixture: {entry.name}: {kind}"
    return f"{where}={value}" if isinstance(value, str) else f"{where}=[{', '.join(value)}]"
