"""Reading a checkpoint's tensors, each from a separate memory mapping, so that only one is in memory at a time."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor

from pipekit.checkpoint.manifest import WEIGHTS, Checksum, Manifest, checksum, find_file_fault, load_manifest
from pipekit.checkpoint.stored_tensors import (
    StoredTensor,
    map_tensor,
    read_header,
    read_tensor,
    reading_error,
)
from pipekit.errors import CheckpointError, DamagedCheckpointError, PipekitError
from pipekit.tensor_parallel.shards import Shard

# A piece that has been read is still in the processor's cache when it is summed up.
_PIECE_BYTES = 2**20


class CheckpointReader:
    """Reader of a checkpoint. A tensor's checksum is checked when the tensor is first read.

    Args:
        path: folder of the checkpoint.
        manifest: manifest of the checkpoint, if some of its files may be missing; by default it is read, and the files
            are checked.

    Raises:
        DamagedCheckpointError: if a file is missing or has another size, or a file without tensors has changed.
        CheckpointError: if there is no checkpoint.
    """

    def __init__(self, path: Path, manifest: Manifest | None = None) -> None:
        self.path = path
        self.manifest: Manifest = load_manifest(path) if manifest is None else manifest
        self._verified: set[tuple[str, str]] = set()
        self._stored_in: dict[Path, dict[str, StoredTensor]] = {}

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of each logical tensor."""
        return {name: entry.shape for name, entry in self.manifest.tensors.items()}

    @property
    def fingerprint(self) -> str:
        """Hash of the names and checksums of the weights."""
        weights = {name: entry.checksums.get(WEIGHTS) for name, entry in self.manifest.tensors.items()}
        return checksum(json.dumps(weights, sort_keys=True).encode())

    def file(self, name: str) -> Path | None:
        """Path of an unchanged file without tensors, such as `config.yaml`; None if there is no such file."""
        return self.path / name if name in self.manifest.file_checksums else None

    def verify(self, name: str, kind: str = WEIGHTS) -> None:
        """Check that a tensor's bytes have not changed since they were written.

        Raises:
            DamagedCheckpointError: if they have changed; the message names the file and the tensor.
            CheckpointError: if the checkpoint does not hold the tensor.
        """
        if (name, kind) in self._verified:
            return
        entry = self.manifest.tensors.get(name)
        if entry is None or kind not in entry.files:
            raise CheckpointError(f"{self.path}: holds no {kind} of {name!r}; it was written by another model")
        stored = self._stored(name, kind)
        dtype = getattr(torch, entry.dtype if kind == WEIGHTS else "float32", None)
        if stored.shape != entry.shape or stored.dtype != dtype:
            fault = f"is {stored.dtype} of shape {stored.shape}, and was {dtype} of shape {entry.shape}"
        elif _stored_checksum(stored) != entry.checksums[kind]:
            fault = "has changed since it was written"
        else:
            self._verified.add((name, kind))
            return
        raise DamagedCheckpointError(f"{self.path / entry.files[kind]}: damaged ({kind} of {name!r} {fault})")

    def tensor(
        self, name: str, kind: str = WEIGHTS, *, shard: Shard | None = None, is_verified: bool = False
    ) -> Tensor:
        """Return a logical tensor's weights, or one of its optimizer states.

        Args:
            name: logical name.
            kind: `weights`, or the name of an optimizer state.
            shard: the shard to read; by default the whole tensor.
            is_verified: whether the tensor's checksum has already been checked, here or on another rank.

        Raises:
            DamagedCheckpointError: if its bytes have changed since they were written.
            CheckpointError: if the checkpoint does not hold the tensor.
        """
        if not is_verified:
            self.verify(name, kind)
        whole = map_tensor(self._stored(name, kind))
        if shard is None:
            return whole
        return torch.cat([whole[(slice(None),) * shard.dim + (own,)] for own in shard.slices], shard.dim)

    def rounded(self, name: str, dtype: torch.dtype) -> Tensor:
        """Return a tensor's weights in fp32, rounded to a number format; integers are unchanged.

        Raises:
            DamagedCheckpointError, CheckpointError: as in `tensor`.
        """
        self.verify(name)
        stored = self._stored(name, WEIGHTS)
        is_float = stored.dtype.is_floating_point
        return read_tensor(stored, rounded_to=dtype, dtype=torch.float32) if is_float else read_tensor(stored)

    def place(self, name: str, kind: str = WEIGHTS) -> tuple[str, int, int]:
        """File of a tensor, its first byte there, and the byte after its last; a file is read in this order.

        Raises:
            DamagedCheckpointError: if the file cannot be read.
        """
        stored = self._stored(name, kind)
        return stored.file.name, stored.begin, stored.end

    def _stored(self, name: str, kind: str) -> StoredTensor:
        file = self.path / self.manifest.tensors[name].files[kind]
        if file not in self._stored_in:
            self._stored_in[file] = read_header(file)
        if name not in self._stored_in[file]:
            raise DamagedCheckpointError(f"{file}: damaged (holds no {name!r})")
        return self._stored_in[file][name]

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Yield every logical tensor's name and weights."""
        for name in self.manifest.tensors:
            yield name, self.tensor(name)


def sound_files(path: Path, manifest: Manifest, names: Collection[str]) -> set[str]:
    """Files of a checkpoint that are present and complete; others may be missing."""
    reader = CheckpointReader(path, manifest)
    held: dict[str, list[tuple[str, str]]] = {name: [] for name in names}
    for tensor, entry in manifest.tensors.items():
        for kind, file in entry.files.items():
            if file in held:
                held[file].append((tensor, kind))
    sound = set()
    for file, tensors in held.items():
        with suppress(PipekitError):
            if find_file_fault(path, manifest, file) is None:
                for tensor, kind in tensors:
                    reader.verify(tensor, kind)
                sound.add(file)
    return sound


def _stored_checksum(stored: StoredTensor) -> str:
    """Checksum of a tensor's bytes, read piece by piece, which is faster than through a mapping."""
    value, piece = Checksum(), memoryview(bytearray(_PIECE_BYTES))
    try:
        with stored.file.open("rb", buffering=0) as opened:
            opened.seek(stored.begin)
            while num_bytes := opened.readinto(piece[: stored.end - opened.tell()]):
                value.update(piece[:num_bytes])
    except OSError as error:
        raise reading_error(error, stored.file) from None
    return value.hexdigest()
