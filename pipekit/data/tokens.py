"""Token files: the token ids of one split, one after the other, as raw memory-mapped integers.

`train.bin` holds the ids, little-endian; `train.json` beside it says how many there are and of which type.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import xxhash

from pipekit.errors import DataError

TokenArray = npt.NDArray[np.uint16] | npt.NDArray[np.uint32]
_FORMAT = "pipekit-tokens"
_VERSION = 1
_BLOCK_BYTES, _NUM_BLOCKS = 1 << 20, 256


def token_dtype(vocab_size: int) -> Literal["uint16", "uint32"]:
    """Return the smallest type that holds every token id below `vocab_size`.

    Example:
        >>> token_dtype(50257), token_dtype(128256)
        ('uint16', 'uint32')
    """
    return "uint16" if vocab_size <= 1 << 16 else "uint32"


class TokenFileWriter:
    """Write a token file piece by piece; use it as a context manager.

    The header is written last, so that a file whose writing broke off cannot be mistaken for a whole one.
    """

    def __init__(self, path: str | Path, *, vocab_size: int) -> None:
        self.path = Path(path)
        self.num_tokens = 0
        self._dtype = token_dtype(vocab_size)
        self._vocab_size = vocab_size
        self._hash = hashlib.blake2b(digest_size=16)

    def __enter__(self) -> TokenFileWriter:
        self._stream = self.path.open("wb")
        return self

    def write(self, token_ids: npt.NDArray[np.int64]) -> None:
        """Append token ids, each in `[0, vocab_size)`."""
        assert token_ids.size == 0 or (token_ids.min() >= 0 and token_ids.max() < self._vocab_size)
        data = token_ids.astype(np.dtype(self._dtype).newbyteorder("<")).tobytes()
        self._hash.update(data)
        self._stream.write(data)
        self.num_tokens += token_ids.size

    @property
    def fingerprint(self) -> str:
        """The hash of all tokens written so far."""
        return self._hash.hexdigest()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with self._stream:
            if kind is None:
                self._stream.flush()
                os.fsync(self._stream.fileno())
        if kind is None:
            sizes = {"dtype": self._dtype, "num_tokens": self.num_tokens}
            header = {"format": _FORMAT, "version": _VERSION, **sizes, "checksum": _sample_checksum(self.path)}
            self.path.with_suffix(".json").write_text(json.dumps(header, indent=2) + "\n", encoding="utf-8")


def is_as_written(path: Path) -> bool:
    """True if a token file holds what was written into it, as far as its checksum tells.

    That of a file of up to 256 MiB is of all its bytes, and that of a longer one of 256 blocks of 1 MiB, evenly spread,
    so that it takes a fraction of a second: a file that another has come in place of is noticed, whatever its size.
    """
    try:
        header = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        return bool(header["checksum"] == _sample_checksum(path))
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _sample_checksum(path: Path) -> str:
    num_bytes = path.stat().st_size
    stride = max(_BLOCK_BYTES, num_bytes // _NUM_BLOCKS)
    checksum = xxhash.xxh3_128(str(num_bytes).encode())
    with path.open("rb") as stream:
        for begin in range(0, num_bytes, stride):
            stream.seek(begin)
            checksum.update(stream.read(_BLOCK_BYTES))
    return checksum.hexdigest()


def load_tokens(path: str | Path) -> TokenArray:
    """Return the tokens of a file `(N,)`, memory-mapped and read-only.

    Raises:
        DataError: if the file or its header is missing, or their sizes disagree.
    """
    path = Path(path)
    remedy = f"delete the folder {path.parent} and prepare the data again"
    header_path = path.with_suffix(".json")
    try:
        header: dict[str, Any] = json.loads(header_path.read_text(encoding="utf-8"))
        num_bytes = path.stat().st_size
        if header["format"] != _FORMAT or header["version"] != _VERSION or header["dtype"] not in ("uint16", "uint32"):
            raise DataError(f"{header_path}: not the header of a token file of this version; {remedy}")
        num_tokens, dtype = int(header["num_tokens"]), np.dtype(header["dtype"]).newbyteorder("<")
    except OSError as error:
        raise DataError(f"{error.filename}: no such token file ({error.strerror}); {remedy}") from error
    except (ValueError, TypeError, KeyError) as error:
        raise DataError(f"{header_path}: not the header of a token file; {remedy}") from error
    if num_bytes != num_tokens * dtype.itemsize:
        raise DataError(
            f"{path}: {num_bytes} bytes, but the header says {num_tokens} tokens of {dtype.itemsize} bytes; {remedy}"
        )
    if num_tokens == 0:  # an empty file cannot be mapped
        return np.empty(0, dtype=dtype)
    return np.memmap(path, dtype=dtype, mode="r")
