"""From the `data` section of a configuration to token files in the cache.

The cache holds one folder for each choice of text and tokenizer, named by a key that is computed without
reading the text. A folder is filled under a temporary name and then renamed, so it is whole or not there; a
lock lets one process build and the others wait.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import time
import uuid
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from pydantic import BaseModel

from pipekit.config import DataConfig
from pipekit.data.corpus import Corpus, Passage, find_corpus, read_passages
from pipekit.data.megatron import (
    INDEX_SUFFIX,
    TOKENS_SUFFIX,
    IndexedTokensWriter,
    TokenSlice,
    sample_checksum,
    take_documents,
)
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
from pipekit.errors import ConfigError, DataError, StorageError
from pipekit.files import LATE_S, is_on_local_disk, replace_folder, wait_until_seen
from pipekit.progress import ProgressCallback
from pipekit.rng import fold_seed
from pipekit.storage import storing

logger = logging.getLogger(__name__)

DEFAULT_CACHE_DIR = "~/.cache/pipekit"
TOKENIZER_SAMPLE_BYTES = 8_000_000
_FORMAT_VERSION = 2  # raise it when the same settings would give other tokens
_BATCH_BYTES = 1 << 20
# A builder writes more often.
_ABANDONED_S = 6 * 3600.0
_META_FILE = "meta.json"
_TRAIN_FILE = "train.bin"
_VALIDATION_FILE = "validation.bin"


class PreparedSource(BaseModel, frozen=True):
    """The tokens of one source, for training and held out.

    `fingerprint` is the hash of all tokens in their order, which is the same on every machine that sees the same data.
    `validation` is None where nothing is held out.
    """

    name: str
    train: TokenSlice
    validation: TokenSlice | None
    fingerprint: str

    @property
    def slices(self) -> tuple[TokenSlice, ...]:
        """The training tokens, and those that are held out where there are any."""
        return (self.train,) if self.validation is None else (self.train, self.validation)


class PreparedData(BaseModel, frozen=True):
    """The tokens of all sources, ready for `TokenDataset`.

    `fingerprint` is a hash over those of the sources.
    """

    tokenizer_path: Path
    vocab_size: int
    sources: tuple[PreparedSource, ...]
    fingerprint: str

    def is_here(self, *, limit_s: float = LATE_S) -> bool:
        """True if this machine sees the files; those of another in a shared folder are waited for, for `limit_s`."""
        sizes: dict[Path, int | None] = {self.tokenizer_path: None}
        for source in self.sources:
            for token_slice in source.slices:
                sizes |= token_slice.file_sizes
        try:
            wait_until_seen(sizes, limit_s=limit_s)
        except StorageError:
            return False
        return True


def prepare_data(
    config: DataConfig,
    *,
    sequence_length: int,
    timeout_s: float = 600.0,
    on_progress: ProgressCallback | None = None,
) -> PreparedData:
    """Return the token files of `config`, from the cache or newly made.

    Any number of processes may call this at the same time: one builds, the others wait for it.

    Args:
        config: the `data` section.
        sequence_length: tokens of one sample; both splits must hold at least one. The cache does not depend on it.
        timeout_s: the longest wait for another process that builds, in seconds.
        on_progress: called with what is being done, and the fraction done in `[0, 1]` or None where that is not known.

    Raises:
        DataError: if the text or the tokenizer cannot be read, another process builds for longer than `timeout_s`, or
            a split is shorter than one sample.
        StorageError: if the cache cannot be written.
    """
    for key, default in {"mixture": None, "stages": (), "validation": None, "workers": 0}.items():
        if getattr(config, key) != default:
            raise ConfigError(f"data.{key}: cannot be used yet; remove it")
    if config.entries[0].limit is not None:
        raise ConfigError(f"data.source={_show(config.source)}: a limit cannot be used yet; remove it")
    report = on_progress or (lambda message, fraction: None)
    corpus = find_corpus(config.source)
    folder = Path(config.cache_dir or DEFAULT_CACHE_DIR).expanduser() / "data" / plan_cache_key(config, corpus)
    prepared = _load_prepared(folder)
    if prepared is None:
        with storing(f"data.cache_dir: {folder.parent}"):
            folder.parent.mkdir(parents=True, exist_ok=True)
            with _build_lock(folder, timeout_s=timeout_s, report=report):
                prepared = _load_prepared(folder)  # another process may have built it while this one waited
                if prepared is None:
                    _remove_leftovers(folder)
                    _build(folder, config, corpus, report)
                    prepared = _load_prepared(folder)
        assert prepared is not None, f"{folder} was just built"
    _check_long_enough(prepared, config, sequence_length)
    return prepared


def plan_cache_key(config: DataConfig, corpus: Corpus) -> str:
    """Return the name of the cache folder for these settings: a hash of all that the tokens depend on.

    Files count by path, size and time of change, the standard library by Python version and sizes, a given tokenizer by
    content.
    """
    tokenizer: object = {"vocab_size": config.vocab_size, "sample_bytes": TOKENIZER_SAMPLE_BYTES}
    if config.tokenizer is not None:
        tokenizer = _hash_tokenizer(find_tokenizer_file(config.tokenizer))
    parts = {
        "version": _FORMAT_VERSION,
        "files": corpus.identity,
        "text_key": config.text_key,
        "max_bytes": config.max_bytes,
        "validation_fraction": config.validation_fraction,
        "tokenizer": tokenizer,
    }
    return hashlib.blake2b(json.dumps(parts, sort_keys=True).encode(), digest_size=12).hexdigest()


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
    first, last = max(0, int(index * fraction) - 1), int((index + 1) * fraction) + 1
    return fraction > 0 and any(
        int((stratum + fold_seed(0, "held out", stratum) / 2**63) / fraction) == index
        for stratum in range(first, last + 1)
    )


def _remove_leftovers(folder: Path) -> None:
    """Remove what builders that were killed have left; who holds the lock is the only builder of this machine.

    On a shared file system that does not honour the lock, another machine may be building.
    """
    is_local, now_s = is_on_local_disk(folder.parent), time.time()
    for leftover in folder.parent.glob(f"{folder.name}.building-*"):
        with suppress(OSError):
            changed_s = max(path.stat().st_mtime for path in (leftover, *leftover.iterdir()))
            if is_local or now_s - changed_s > _ABANDONED_S:
                shutil.rmtree(leftover, ignore_errors=True)


def _build(folder: Path, config: DataConfig, corpus: Corpus, report: ProgressCallback) -> None:
    temporary = folder.with_name(f"{folder.name}.building-{uuid.uuid4().hex[:8]}")
    temporary.mkdir()
    try:
        with tokenizer_threads():
            tokenizer = _build_tokenizer(temporary, config, corpus, report)
            meta = _write_splits(temporary, config, corpus, tokenizer, report)
        (temporary / _META_FILE).write_text(json.dumps(meta, indent=2) + "\n", encoding="utf-8")
        # Another machine's, which it may read already, stays; any other is broken, or it would have been used.
        if _load_prepared(folder) is None:
            replace_folder(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _build_tokenizer(folder: Path, config: DataConfig, corpus: Corpus, report: ProgressCallback) -> TextTokenizer:
    if config.tokenizer is not None:
        tokenizer = load_tokenizer(config.tokenizer)
        copy_tokenizer(config.tokenizer, folder)
        return tokenizer
    report("training the tokenizer", None)
    tokenizer = train_tokenizer(_sample_texts(config, corpus), vocab_size=config.vocab_size)
    tokenizer.backend.save(str(folder / TOKENIZER_FILE))
    return tokenizer


def _sample_texts(config: DataConfig, corpus: Corpus) -> Iterator[str]:
    """Yield training passages, evenly over the corpus, of about `TOKENIZER_SAMPLE_BYTES` bytes in all."""
    num_bytes_read = num_bytes_sampled = 0
    share = min(1.0, TOKENIZER_SAMPLE_BYTES / max(1, _num_corpus_bytes(config, corpus)))
    for passage, held_out in _read_splits(config, corpus):
        if held_out:
            continue
        num_bytes_read += passage.num_bytes
        if num_bytes_sampled + passage.num_bytes <= share * num_bytes_read:
            num_bytes_sampled += passage.num_bytes
            yield passage.text


def _write_splits(
    folder: Path, config: DataConfig, corpus: Corpus, tokenizer: TextTokenizer, report: ProgressCallback
) -> dict[str, Any]:
    end, vocab_size, num_corpus_bytes = tokenizer.end_token_id, tokenizer.vocab_size, _num_corpus_bytes(config, corpus)
    num_bytes = num_documents = 0
    with ExitStack() as stack:
        train = stack.enter_context(IndexedTokensWriter(folder / _TRAIN_FILE, vocab_size=vocab_size))
        validation = train
        if config.validation_fraction > 0:
            validation = stack.enter_context(IndexedTokensWriter(folder / _VALIDATION_FILE, vocab_size=vocab_size))
        unfinished: IndexedTokensWriter | None = None
        for batch in _batches(_read_splits(config, corpus)):
            report("encoding the text", min(1.0, num_bytes / num_corpus_bytes))
            all_token_ids = tokenizer.encode_batch([passage.text for passage, _ in batch])
            for (passage, held_out), token_ids in zip(batch, all_token_ids, strict=True):
                writer = validation if held_out else train
                if unfinished is not None and unfinished is not writer:
                    unfinished.end_document(end)  # the rest of the document goes to the other split
                writer.write(token_ids)
                if passage.ends_document:
                    writer.end_document(end)
                unfinished = None if passage.ends_document else writer
                num_bytes += passage.num_bytes
                num_documents += passage.ends_document
        if num_documents == 0:
            raise DataError(f"data.source={_show(config.source)} holds no text; give files that are not empty")
        if unfinished is not None:
            unfinished.end_document(end)
        report("encoding the text", 1.0)
        both = f"{train.fingerprint} {validation.fingerprint}"
    files = sorted(path for path in folder.iterdir() if path.suffix in (TOKENS_SUFFIX, INDEX_SUFFIX))
    return {
        "version": _FORMAT_VERSION,
        "vocab_size": vocab_size,
        "fingerprint": hashlib.blake2b(both.encode(), digest_size=16).hexdigest(),
        "checksums": {path.name: sample_checksum(path) for path in files},
        "source": _show(config.source),
        "num_documents": num_documents,
        "num_text_bytes": num_bytes,
    }


def _load_prepared(folder: Path) -> PreparedData | None:
    """Return the prepared data of a cache folder, or None if it is missing or incomplete."""
    if not folder.is_dir():
        return None
    try:
        meta = json.loads((folder / _META_FILE).read_text(encoding="utf-8"))
        checksums, fingerprint = dict(meta["checksums"]), meta["fingerprint"]
        if any(sample_checksum(folder / name) != checksum for name, checksum in checksums.items()):
            raise DataError("its files are not as they were written")
        source = PreparedSource(
            name="text",
            train=take_documents(folder / _TRAIN_FILE),
            validation=take_documents(folder / _VALIDATION_FILE) if _VALIDATION_FILE in checksums else None,
            fingerprint=fingerprint,
        )
        path = folder / TOKENIZER_FILE
        prepared = PreparedData(
            tokenizer_path=path, vocab_size=meta["vocab_size"], sources=(source,), fingerprint=fingerprint
        )
        if load_tokenizer(path).vocab_size != prepared.vocab_size:
            raise DataError("its tokenizer is another")
    except (OSError, ValueError, TypeError, KeyError, DataError) as error:
        logger.warning("cached data in %s is broken and is made again: %s", folder, error)
        return None
    return prepared


def _build_lock(folder: Path, *, timeout_s: float, report: ProgressCallback) -> AbstractContextManager[object]:
    # The operating system frees the lock of a process that has ended, however it ended.
    lock_path = folder.with_name(f"{folder.name}.lock")
    lock = FileLock(lock_path, poll_interval=0.1)
    with suppress(Timeout):
        return lock.acquire(timeout=0)
    report(f"waiting for another process to prepare the data ({lock_path})", None)
    try:
        return lock.acquire(timeout=timeout_s)
    except Timeout as error:
        raise DataError(
            f"waited {timeout_s:g} s for another process to prepare the data in {folder}, and it still holds "
            f"the lock {lock_path}; let it finish and start again, or raise run.timeout_s"
        ) from error


def _check_long_enough(prepared: PreparedData, config: DataConfig, sequence_length: int) -> None:
    needed = sequence_length + 1
    sample = f"one sample of train.sequence_length={sequence_length} needs {needed}"
    (source,) = prepared.sources
    num_train = source.train.num_tokens
    num_held_out = source.validation.num_tokens if source.validation is not None else 0
    if num_train < needed:
        wider = "" if config.max_bytes is None else f", raise data.max_bytes={config.max_bytes}"
        raise DataError(
            f"data.source={_show(config.source)} gives {num_train} training tokens, and {sample}; "
            f"lower train.sequence_length{_at_most(num_train)}{wider}, or give more text"
        )
    if source.validation is not None and num_held_out < needed:
        raise DataError(
            f"data.validation_fraction={config.validation_fraction:g} holds out {num_held_out} of "
            f"{num_train + num_held_out} tokens of data.source={_show(config.source)}, and {sample}; "
            f"raise data.validation_fraction, lower train.sequence_length{_at_most(num_held_out)}, "
            "or set data.validation_fraction=0 to train without validation"
        )


def _at_most(num_tokens: int) -> str:
    return f" to {num_tokens - 1} or less" if num_tokens > 1 else ""


def _read_splits(config: DataConfig, corpus: Corpus) -> Iterator[tuple[Passage, bool]]:
    passages = read_passages(corpus, text_key=config.text_key, max_bytes=config.max_bytes)
    for index, passage in enumerate(passages):
        yield passage, is_held_out(index, config.validation_fraction)


def _batches(passages: Iterable[tuple[Passage, bool]]) -> Iterator[list[tuple[Passage, bool]]]:
    batch: list[tuple[Passage, bool]] = []
    num_bytes = 0
    for passage, held_out in passages:
        batch.append((passage, held_out))
        num_bytes += passage.num_bytes
        if num_bytes >= _BATCH_BYTES:
            yield batch
            batch, num_bytes = [], 0
    if batch:
        yield batch


def _num_corpus_bytes(config: DataConfig, corpus: Corpus) -> int:
    return corpus.num_bytes if config.max_bytes is None else min(corpus.num_bytes, config.max_bytes)


def _hash_tokenizer(path: Path) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for file in (path, *(path.parent / name for name in SIDE_FILES)):
        digest.update(file.read_bytes() if file.is_file() else b"")
        digest.update(b"\0")
    return digest.hexdigest()


def _show(source: str | Sequence[str]) -> str:
    return source if isinstance(source, str) else "[" + ", ".join(source) + "]"
