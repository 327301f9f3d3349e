"""Writing tensors into a safetensors file, and their checksums on the way."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from pipekit.checkpoint.manifest import checksum
from pipekit.errors import CheckpointError

_DTYPES = {
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


def tensor_bytes(tensor: Tensor) -> memoryview:
    """Bytes of a tensor in the host's memory, without a copy where it is contiguous."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], *, read: Callable[[str], Tensor] | None = None
) -> dict[str, str]:
    """Write tensors into a file that is on the disk afterwards, and return their checksums.

    Where `read` is given, `tensors` tell shapes and number formats alone, such as on torch's meta device, and each is
    read as it is written, so that one at a time is in memory.

    The library's own `save_file` copies all of them, and holds Python's lock while the disk is busy.

    Raises:
        CheckpointError: if safetensors knows no such number format.
        OSError: if the file cannot be written.

    Source: the safetensors format (https://github.com/huggingface/safetensors#format).
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    # Larger numbers first, so that each is aligned.
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    end = 0
    for name in names:
        tensor = tensors[name]
        if tensor.dtype not in _DTYPES:
            raise CheckpointError(f"{name!r} is {tensor.dtype}, which a safetensors file cannot hold; cast it")
        begin, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    checksums = {}
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            data = tensor_bytes(tensors[name] if read is None else read(name))
            checksums[name] = checksum(data)
            file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return checksums
