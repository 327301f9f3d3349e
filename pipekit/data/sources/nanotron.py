"""Token files of nanotron, which datatrove writes: ids in a `.ds` file, the ends of documents in a `.ds.index` file."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from pipekit.data.sources.formats import CorpusFile, TokenFormat, TokenIds
from pipekit.errors import DataError

_ITEM_SIZES = {2: "<u2", 4: "<u4"}


class Nanotron(TokenFormat):
    """A file of 2 or 4 bytes an id; the index holds the number of tokens up to the end of each document, in 8 bytes.

    Source: datatrove, src/datatrove/pipeline/tokens/tokenizer.py.
    """

    title = "nanotron token files"

    def matches(self, path: Path, head: bytes, *, is_named: bool) -> bool:
        return path.suffix == ".ds" and _index_of(path).is_file()

    def read_token_ids(self, file: CorpusFile) -> Iterator[TokenIds]:
        num_bytes, index = file.path.stat().st_size, _index_of(file.path)
        ends = np.fromfile(index, "<u8") if index.stat().st_size % 8 == 0 else np.empty(0, "<u8")
        num_tokens = int(ends[-1]) if len(ends) else 0
        item_size = num_bytes // num_tokens if num_tokens else 0
        if item_size not in _ITEM_SIZES or num_bytes != item_size * num_tokens or (np.diff(ends.view("<i8")) < 0).any():
            raise DataError(
                f"{file.path}: has {num_bytes:,} bytes, and {index.name} tells of {num_tokens:,} tokens in "
                f"{len(ends):,} documents, which take 2 or 4 bytes each; one of the two was cut short, or is another's"
            )
        tokens = np.memmap(file.path, _ITEM_SIZES[item_size], "r")
        begin = 0
        for end in ends.tolist():
            yield tokens[begin:end]
            begin = end


FORMAT = Nanotron()


def _index_of(path: Path) -> Path:
    return path.with_name(path.name + ".index")
