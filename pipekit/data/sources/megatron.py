"""Megatron's token files: the ids in a `.bin` file, and where documents begin in the `.idx` file beside it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from pipekit.data.megatron import INDEX_SUFFIX, MAGIC, TOKENS_SUFFIX, IndexedTokens
from pipekit.data.sources.formats import CorpusFile, TokenFormat, TokenIds, describe_file
from pipekit.errors import DataError


class Megatron(TokenFormat):
    """A `.bin` file with its `.idx` file. Either of them may be named, or both together without a suffix."""

    title = "Megatron token files"

    def find(self, source: str) -> list[CorpusFile] | None:
        given = Path(source).expanduser()
        stem = given.with_suffix("") if given.suffix in (TOKENS_SUFFIX, INDEX_SUFFIX) else given
        tokens, index = stem.with_name(stem.name + TOKENS_SUFFIX), stem.with_name(stem.name + INDEX_SUFFIX)
        is_named_whole = given in (tokens, index)
        if (given.exists() and not is_named_whole) or not _is_index(index):
            return None
        if not tokens.is_file():
            raise DataError(f"data.source={source!r}: there is no {tokens.name} beside {index}; give both files")
        return [_describe(tokens, is_named=True)]

    def matches(self, path: Path, head: bytes, *, is_named: bool) -> bool:
        return path.suffix == TOKENS_SUFFIX and _is_index(path.with_suffix(INDEX_SUFFIX))

    def read_token_ids(self, file: CorpusFile) -> Iterator[TokenIds]:
        return IndexedTokens(file.path).documents()


FORMAT = Megatron()


def _describe(tokens: Path, *, is_named: bool) -> CorpusFile:
    file, changed_ns = (
        describe_file(tokens, FORMAT, is_named=is_named),
        tokens.with_suffix(INDEX_SUFFIX).stat().st_mtime_ns,
    )
    assert file.mtime_ns is not None
    return replace(file, mtime_ns=max(file.mtime_ns, changed_ns))


def _is_index(path: Path) -> bool:
    if not path.is_file():
        return False
    with path.open("rb") as stream:
        return stream.read(len(MAGIC)) == MAGIC
