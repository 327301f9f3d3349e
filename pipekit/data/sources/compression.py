"""Compressed files, gzip and zstd, told by their first bytes and read as what they hold."""

from __future__ import annotations

import contextlib
import gzip
import io
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, cast

from pipekit.data.sources.formats import need
from pipekit.errors import DataError

_GZIP, _ZSTD = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"
_SUFFIXES = (".gz", ".gzip", ".zst", ".zstd")


def plain_name(path: Path) -> str:
    """Name of a file in lower case, without the suffix of its compression.

    Example:
        >>> plain_name(Path("data/C4-00001.json.gz"))
        'c4-00001.json'
    """
    name = path.name.lower()
    return next((name.removesuffix(suffix) for suffix in _SUFFIXES if name.endswith(suffix)), name)


@contextlib.contextmanager
def open_plain(path: Path) -> Iterator[BinaryIO]:
    """Open a file for reading, decompressed if it is compressed.

    Raises:
        DataError: in the block too, if the file cannot be read, or its compressed data are broken or cut short.
    """
    kind = ""
    try:
        with path.open("rb") as stream:
            magic = stream.read(4)
        if magic.startswith(_GZIP):
            kind = "gzip"
            with gzip.open(path, "rb") as stream:
                yield cast(BinaryIO, stream)
        elif magic == _ZSTD:
            kind = "zstd"
            with need("pyarrow", path).input_stream(str(path), compression="zstd") as stream:
                yield cast(BinaryIO, io.BufferedReader(stream, 1 << 20))
        else:
            with path.open("rb") as stream:
                yield stream
    except (EOFError, zlib.error, gzip.BadGzipFile, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error
        raise DataError(
            f"{path}: the {kind} file is broken or was cut short ({error}); get it again, or take it out of data.source"
        ) from error
