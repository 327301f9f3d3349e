"""Folders of safetensors files as Hugging Face has them: one file, or shards with an index."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from pipekit.checkpoint.manifest import Checksum, checksum
from pipekit.checkpoint.stored_tensors import StoredTensor, map_tensor, read_header, read_tensor
from pipekit.checkpoint.writer import tensor_bytes, write_tensors
from pipekit.errors import CheckpointError
from pipekit.files import write_atomically
from pipekit.storage import storing

MODEL_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

_SAMPLE_BYTES = 4096

ExportDtype = Literal["float32", "bfloat16", "float16"]


class SafetensorsFolder(Mapping[str, Tensor]):
    """The tensors of a folder by name, in one safetensors file or in several.

    A tensor is mapped when it is asked for, so that no more than that of a file stays in memory.

    Args:
        path: the folder.

    Raises:
        CheckpointError: if the weights are in another format, or a file is missing.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._stored = self._read_headers()

    def __getitem__(self, name: str) -> Tensor:
        return self.read(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._stored)

    def __len__(self) -> int:
        return len(self._stored)

    def __contains__(self, name: object) -> bool:
        return name in self._stored

    def read(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """A tensor in memory of its own, in another number format where one is given."""
        return read_tensor(self._stored[name], dtype=dtype)

    def mapped(self, name: str) -> Tensor:
        """A tensor in the mapped file, of which only what is used is read."""
        return map_tensor(self._stored[name])

    def described(self, name: str) -> Tensor:
        """Shape and number format of a tensor, on torch's meta device."""
        return torch.empty(self._stored[name].shape, dtype=self._stored[name].dtype, device="meta")

    @property
    def fingerprint(self) -> str:
        """Hash of names, shapes and number formats, and of the first and last kilobytes of every tensor.

        Training changes every part of a weight, and a model is larger than one wants to read at every start.
        """
        value = Checksum()
        for name, stored in sorted(self._stored.items()):
            value.update(repr((name, stored.shape, str(stored.dtype))).encode())
            with storing(stored.file, doing="read"), stored.file.open("rb") as file:
                for begin in (stored.begin, max(stored.begin, stored.end - _SAMPLE_BYTES)):
                    file.seek(begin)
                    value.update(file.read(min(_SAMPLE_BYTES, stored.end - begin)))
        return value.hexdigest()

    def _read_headers(self) -> dict[str, StoredTensor]:
        if not (self.path / INDEX_FILE).is_file():
            if not (self.path / MODEL_FILE).is_file():
                raise CheckpointError(self._no_weights())
            return read_header(self.path / MODEL_FILE)
        files = self._read_index()
        headers = {file_name: read_header(self.path / file_name) for file_name in sorted(set(files.values()))}
        if missing := [name for name, file_name in files.items() if name not in headers[file_name]]:
            raise CheckpointError(f"{self.path / files[missing[0]]}: holds no {missing[0]}, and {INDEX_FILE} names it")
        return {name: headers[file_name][name] for name, file_name in files.items()}

    def _read_index(self) -> dict[str, str]:
        """File of each tensor, all of them in the folder."""
        index = self.path / INDEX_FILE
        try:
            files: dict[str, str] = dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
            outside = [name for name in sorted(set(files.values())) if Path(name).name != name]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{index}: cannot be read: {error}") from None
        if outside:
            raise CheckpointError(f"{index}: names {outside[0]!r}, which is outside of the folder")
        for name in sorted(set(files.values())):
            if not (self.path / name).is_file():
                raise CheckpointError(f"{self.path / name}: is missing, and {INDEX_FILE} names it")
        return files

    def _no_weights(self) -> str:
        pickled = sorted(path.name for path in self.path.glob("pytorch_model*.bin"))
        if not pickled:
            return f"{self.path}: has no {MODEL_FILE} and no {INDEX_FILE}, so it holds no weights"
        return (
            f"{self.path / pickled[0]}: is a pickle, which runs code when it is read, and is not read; write the model "
            f"again with transformers: AutoModelForCausalLM.from_pretrained({str(self.path)!r}, dtype='auto')"
            ".save_pretrained('NEW_FOLDER')"
        )


def write_shards(
    folder: Path, tensors: Mapping[str, Tensor], *, read: Callable[[str], Tensor], shard_bytes: int
) -> dict[str, str]:
    """Write tensors into safetensors files of at most `shard_bytes`, or of one tensor, and return their checksums.

    Where one file holds all of them, it is `model.safetensors`; several are numbered, with an index beside them.

    Args:
        folder: where to write.
        tensors: shapes and number formats, such as on torch's meta device, in the order of the files.
        read: returns a tensor by name as it is written, so that one at a time is in memory.
        shard_bytes: size of the tensors of a file.
    """
    shards: list[dict[str, Tensor]] = [{}]
    for name, tensor in tensors.items():
        held_bytes = sum(held.nbytes for held in shards[-1].values())
        if shards[-1] and held_bytes + tensor.nbytes > shard_bytes:
            shards.append({})
        shards[-1][name] = tensor
    if len(shards) == 1:
        return write_tensors(folder / MODEL_FILE, tensors, read=read)
    checksums: dict[str, str] = {}
    files: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        checksums |= write_tensors(folder / file, shard, read=read)
        files |= dict.fromkeys(shard, file)
    index = {
        "metadata": {"total_size": sum(tensor.nbytes for tensor in tensors.values())},
        "weight_map": dict(sorted(files.items())),
    }
    write_atomically(folder / INDEX_FILE, json.dumps(index, indent=2) + "\n")
    return checksums


def find_changed(folder: Path, checksums: Mapping[str, str]) -> str | None:
    """Name of a tensor of a folder whose checksum is not that of what was written; None if there is none."""
    stored = SafetensorsFolder(folder)
    for name in sorted(checksums.keys() | stored.keys()):
        if name not in checksums or name not in stored or checksum(tensor_bytes(stored[name])) != checksums[name]:
            return name
    return None


def exported_dtype(stored: torch.dtype, asked: ExportDtype) -> torch.dtype:
    """Number format of an exported tensor: the one asked for, but for integers."""
    return getattr(torch, asked) if stored.is_floating_point else stored
