"""Raw export: a checkpoint's weights in one safetensors file under logical names, with a loader that needs torch alone.

It takes every checkpoint, whatever its model, and runs no code that the checkpoint names.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from pipekit.checkpoint.manifest import resolve_checkpoint
from pipekit.checkpoint.reader import CheckpointReader
from pipekit.checkpoint.writer import write_tensors
from pipekit.errors import PipekitError
from pipekit.files import building_folder, check_free, write_atomically
from pipekit.inference.safetensors_folder import MODEL_FILE, ExportDtype, exported_dtype, find_changed

LOADER_FILE = "load_tensors.py"

LOADER = '''"""Loads the tensors of model.safetensors by name. Needs torch and nothing else."""

import json
from pathlib import Path

import torch

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "BOOL": torch.bool,
          "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8}


def load_tensors(path=Path(__file__).with_name("model.safetensors"), layer=""):
    """All tensors; of a layer, such as "blocks.0", under the names for its load_state_dict."""
    data = torch.from_file(str(path), size=Path(path).stat().st_size, dtype=torch.uint8)  # mapped, not read
    start = 8 + int.from_bytes(bytes(data[:8].tolist()), "little")
    entries = json.loads(bytes(data[8:start].tolist()))
    tensors = {}
    for name, entry in entries.items():
        if name != "__metadata__" and name.startswith(layer and layer + "."):
            first, last = entry["data_offsets"]
            flat = data[start + first : start + last].view(DTYPES[entry["dtype"]])
            tensors[name.removeprefix(layer and layer + ".")] = flat.reshape(entry["shape"])
    return tensors


if __name__ == "__main__":
    for name, tensor in load_tensors().items():
        print(name, tuple(tensor.shape), tensor.dtype)
'''


@dataclass(frozen=True)
class RawExport:
    """A raw export: the checkpoint, its step, and the number of tensors and elements written."""

    checkpoint: str
    step: int
    num_tensors: int
    num_elements: int


def export_raw(
    source: str | Path,
    out: str | Path,
    *,
    dtype: ExportDtype = "float32",
    overwrite: bool = False,
) -> RawExport:
    """Write weights under logical names, read them back, and compare every bit; a tensor at a time is in memory.

    The folder holds `model.safetensors`, `load_tensors.py`, and the checkpoint's other files, such as `config.yaml` and
    `tokenizer.json`.

    Args:
        source: a run's folder, or one of its checkpoints.
        out: the folder to write; `overwrite` replaces an earlier raw export in it.
        dtype: of the exported tensors, but for integers.

    Raises:
        CheckpointError: if there is no checkpoint, or it is damaged.
        PipekitError: if `out` is there already, or the file does not hold what was written; nothing is left behind.
    """
    reader, out = CheckpointReader(resolve_checkpoint(Path(source))), Path(out)
    check_free(out, marker=LOADER_FILE, what="raw export", overwrite=overwrite)
    planned = {
        name: torch.empty(entry.shape, dtype=exported_dtype(getattr(torch, entry.dtype), dtype), device="meta")
        for name, entry in reader.manifest.tensors.items()
    }

    def read(name: str) -> Tensor:
        return reader.tensor(name).to(planned[name].dtype)

    with building_folder(out.resolve()) as temporary:
        checksums = write_tensors(temporary / MODEL_FILE, planned, read=read)
        if (changed := find_changed(temporary, checksums)) is not None:
            raise PipekitError(f"{out}: {changed} is not what was written; the disk may be at fault")
        write_atomically(temporary / LOADER_FILE, LOADER)
        for name in reader.manifest.file_checksums:
            if (file := reader.file(name)) is not None:
                shutil.copyfile(file, temporary / name)
    elements = sum(tensor.numel() for tensor in planned.values())
    return RawExport(str(reader.path), reader.manifest.training.step, len(planned), elements)
