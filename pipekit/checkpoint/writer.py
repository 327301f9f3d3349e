"""Writing tensors to safetensors files, with their checksums."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from itertools import zip_longest
from pathlib import Path

import torch
from torch import Tensor

from pipekit.checkpoint.manifest import Checksum
from pipekit.errors import CheckpointError
from pipekit.storage import storing

DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""Number formats, as safetensors writes them."""

# A piece that has been summed up is still in the processor's cache when it is copied.
_PIECE_BYTES = 2**20
# Of so many bytes the disk begins to write while the next are summed up and copied.
_DISK_BYTES = 32 * 2**20


def tensor_bytes(tensor: Tensor) -> memoryview:
    """Bytes of a tensor in the host's memory, without a copy if it is contiguous."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], *, read: Callable[[str], Tensor] | None = None
) -> dict[str, str]:
    """Write tensors to a file, flush it to the disk, and return the tensors' checksums.

    If `read` is given, `tensors` provide only shapes and number formats, for example on torch's meta device. Each
    tensor is read while the previous one is written, so two are in memory at a time.

    The library's own `save_file` copies all tensors, and holds Python's lock while it writes.

    Raises:
        CheckpointError: if safetensors does not support a number format.
        StorageError: if the file cannot be written.

    Source: the safetensors format (https://github.com/huggingface/safetensors#format).
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    # Larger numbers first, so that each is aligned.
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    end = 0
    for name in names:
        tensor = tensors[name]
        if tensor.dtype not in DTYPES:
            raise CheckpointError(f"{name!r} is {tensor.dtype}, which a safetensors file cannot hold; cast it")
        begin, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)

    def prepare(name: str) -> memoryview:
        return tensor_bytes(tensors[name] if read is None else read(name))

    checksums = {}
    with storing(path, needed_bytes=end), path.open("wb") as file, ThreadPoolExecutor(1) as thread:
        file.write(len(text).to_bytes(8, "little") + text)
        begun = 0
        following = [thread.submit(prepare, name) for name in names[:1]]
        for name, next_name in zip_longest(names, names[1:]):
            data = following.pop().result()
            if next_name is not None:
                following.append(thread.submit(prepare, next_name))
            value = Checksum()
            for begin in range(0, len(data), _PIECE_BYTES):
                piece = data[begin : begin + _PIECE_BYTES]
                value.update(piece)
                file.write(piece)
                if (unbegun := file.tell() - begun) >= _DISK_BYTES and sys.platform == "linux":
                    # Changed pages begin to be written, and this does not wait for them.
                    os.posix_fadvise(file.fileno(), begun, unbegun, os.POSIX_FADV_DONTNEED)
                    begun += unbegun
            checksums[name] = value.hexdigest()
        file.flush()
        os.fsync(file.fileno())
    return checksums
