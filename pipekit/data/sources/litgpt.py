"""Folders of token files of litgpt, which litdata writes: `chunk-*.bin` files, and an `index.json` that lists them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from pipekit.data.sources.formats import CorpusFile, TokenFormat, TokenIds, describe_file
from pipekit.errors import DataError
from pipekit.files import parse_json, read_regular

_INDEX_FILE = "index.json"
_MAX_INDEX_BYTES = 1_000_000_000
# By the number that litdata gives a type of torch.
_TYPES = {11: "<u1", 13: "<i2", 14: "<i2", 15: "<i4", 16: "<i4", 17: "<i8", 18: "<i8", 20: "<u2"}


class Litgpt(TokenFormat):
    """A folder of chunks. One begins with the number of its documents and the places of their first bytes and of the
    end, in 4 bytes each; the token ids follow.

    Source: litdata, src/litdata/streaming/writer.py.
    """

    title = "litgpt token files"

    def find(self, source: str) -> list[CorpusFile] | None:
        folder = Path(source).expanduser()
        index = _read_index(folder / _INDEX_FILE)
        if index is None:
            return None
        _type_of(index, folder)
        files = [folder / Path(chunk["filename"]).name for chunk in index["chunks"]]
        for file in files:
            if not file.is_file():
                raise DataError(
                    f"{file}: is missing, and {_INDEX_FILE} names it; copy it there, or prepare the data again"
                )
        return [describe_file(file, self, is_named=True) for file in files]

    def read_token_ids(self, file: CorpusFile) -> Iterator[TokenIds]:
        index = _read_index(file.path.parent / _INDEX_FILE)
        dtype = np.dtype(_type_of(index, file.path.parent))
        # An empty file cannot be mapped.
        data = np.memmap(file.path, np.uint8, "r") if file.path.stat().st_size else np.empty(0, np.uint8)
        num_documents = int(data[:4].view("<u4")[0]) if len(data) >= 4 else 0
        first = 4 * (num_documents + 2)
        bounds = data[4:first].view("<u4").astype(np.int64) if len(data) >= first else np.empty(0, np.int64)
        sizes = np.diff(bounds)
        if (
            not len(sizes)
            or bounds[0] != first
            or bounds[-1] != len(data)
            or (sizes < 0).any()
            or (sizes % dtype.itemsize).any()
        ):
            raise DataError(
                f"{file.path}: is broken or was cut short: its header does not describe its {len(data):,} bytes"
            )
        # Documents need not begin at a multiple of 8 bytes.
        tokens = data[first:].view(dtype)
        for begin, end in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
            yield tokens[(begin - first) // dtype.itemsize : (end - first) // dtype.itemsize]


FORMAT = Litgpt()


def _read_index(path: Path) -> Any:
    """The index of a folder of litdata's; None if it is not one."""
    if not path.is_file():
        return None
    try:
        index = parse_json(read_regular(path, max_bytes=_MAX_INDEX_BYTES))
        is_named = all(isinstance(chunk["filename"], str) for chunk in index["chunks"])
        return index if index["config"]["data_format"] and is_named else None
    except (ValueError, TypeError, KeyError, OSError):
        return None


def _type_of(index: Any, folder: Path) -> str:
    kind, config = index["config"]["data_format"], index["config"]
    name, _, number = str(kind[0]).partition(":")
    if len(kind) != 1 or name != "no_header_tensor" or not number.isdigit() or int(number) not in _TYPES:
        raise DataError(
            f"{folder / _INDEX_FILE}: the items are of {', '.join(map(str, kind))}, not tensors of token ids"
        )
    if any(chunk.get("dim") is None for chunk in index["chunks"]):
        raise DataError(
            f"{folder / _INDEX_FILE}: its items have headers; prepare them again with litdata's TokensLoader"
        )
    if config.get("compression") or config.get("encryption"):
        raise DataError(f"{folder / _INDEX_FILE}: its chunks are compressed or encrypted; prepare them again without")
    return _TYPES[int(number)]
