"""Tensors in safetensors files: their positions, and memory mappings of one tensor at a time."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from pipekit.checkpoint.writer import DTYPES
from pipekit.errors import DamagedCheckpointError, PipekitError
from pipekit.storage import find_storage_error

_PIECE_ELEMENTS = 2**23


@dataclass(frozen=True)
class StoredTensor:
    """Place of a tensor in its file, in bytes."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int


def reading_error(error: Exception, file: Path) -> PipekitError:
    """Error for a file that cannot be read: the disk's error, or that the file is damaged."""
    found = find_storage_error(error, file, doing="read")
    return found or DamagedCheckpointError(f"{file}: damaged ({error})")


def read_header(file: Path) -> dict[str, StoredTensor]:
    """Read the header of a safetensors file, which the library checks: the place of each tensor by name.

    Raises:
        DamagedCheckpointError: if it is damaged.
        StorageError: if the disk fails.
    """
    try:
        with safe_open(file, framework="pt", device="cpu"):
            pass
        with file.open("rb") as opened:
            data_begin = 8 + int.from_bytes(opened.read(8), "little")
            header = json.loads(opened.read(data_begin - 8))
        dtypes = {text: dtype for dtype, text in DTYPES.items()}
        header.pop("__metadata__", None)
        stored = {
            name: (dtypes[entry["dtype"]], entry["shape"], entry["data_offsets"]) for name, entry in header.items()
        }
    except (SafetensorError, OSError, ValueError) as error:
        raise reading_error(error, file) from None
    except KeyError as error:
        raise DamagedCheckpointError(f"{file}: damaged (no checkpoint holds numbers of format {error})") from None
    return {
        name: StoredTensor(file, dtype, tuple(shape), data_begin + begin, data_begin + end)
        for name, (dtype, shape, (begin, end)) in stored.items()
    }


def map_tensor(stored: StoredTensor) -> Tensor:
    """A tensor in a memory mapping that lives as long as the tensor: only the bytes that are used are read."""
    try:
        mapped = torch.UntypedStorage.from_file(str(stored.file), shared=False, nbytes=stored.end)
    except RuntimeError as error:
        raise reading_error(error, stored.file) from None
    return torch.empty(0, dtype=stored.dtype).set_(mapped[stored.begin :]).reshape(stored.shape)


def read_tensor(
    stored: StoredTensor, *, rounded_to: torch.dtype | None = None, dtype: torch.dtype | None = None
) -> Tensor:
    """Read a tensor into new memory, in small pieces, so that no second copy of its size is needed.

    Args:
        stored: place of the tensor.
        rounded_to: number format to which to round its numbers first.
        dtype: number format of the result; by default the stored one.
    """
    result = torch.empty(stored.shape, dtype=dtype or stored.dtype)
    flat = result.view(-1)
    for begin in range(0, flat.numel(), _PIECE_ELEMENTS):
        # Each piece has a mapping of its own, with which its pages go.
        piece = map_tensor(stored).view(-1)[begin : begin + _PIECE_ELEMENTS]
        flat[begin : begin + _PIECE_ELEMENTS] = piece.to(rounded_to or stored.dtype)
    return result
