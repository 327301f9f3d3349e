"""Reading a checkpoint's tensors, one at a time, each from a mapping of its own, so that no other stays in memory."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from pipekit.checkpoint.manifest import WEIGHTS, Manifest, checksum, load_manifest
from pipekit.checkpoint.writer import tensor_bytes
from pipekit.errors import CheckpointError, DamagedCheckpointError
from pipekit.tensor_parallel.shards import Shard


class CheckpointReader:
    """A checkpoint, open for reading; `path` is its folder. A tensor is checked when it is first read.

    Raises:
        DamagedCheckpointError: if a file is missing, of another size, or, without tensors, has changed.
        CheckpointError: if there is no checkpoint.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.manifest: Manifest = load_manifest(path)
        self._verified: set[tuple[str, str]] = set()

    def file(self, name: str) -> Path | None:
        """Path of a file without tensors, such as `config.yaml`, as it was written; None where there is none."""
        return self.path / name if name in self.manifest.file_checksums else None

    def verify(self, name: str, kind: str = WEIGHTS) -> None:
        """Check that a tensor's bytes are those that were written.

        Raises:
            DamagedCheckpointError: if they are not; the message names the file and the tensor.
            CheckpointError: if the checkpoint does not hold it.
        """
        if (name, kind) in self._verified:
            return
        entry = self.manifest.tensors.get(name)
        if entry is None or kind not in entry.files:
            raise CheckpointError(f"{self.path}: holds no {kind} of {name!r}; it was written by another model")
        tensor = self._mapped(name, kind)
        dtype = entry.dtype if kind == WEIGHTS else "float32"
        if tuple(tensor.shape) != entry.shape or str(tensor.dtype) != f"torch.{dtype}":
            fault = f"is {tensor.dtype} of shape {tuple(tensor.shape)}, and was torch.{dtype} of shape {entry.shape}"
        elif checksum(tensor_bytes(tensor)) != entry.checksums[kind]:
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
            is_verified: True where the tensor's checksum has been checked, here or on another rank.

        Raises:
            DamagedCheckpointError: if its bytes are not those that were written.
            CheckpointError: if the checkpoint does not hold it.
        """
        if not is_verified:
            self.verify(name, kind)
        whole = self._mapped(name, kind)
        if shard is None:
            return whole
        return torch.cat([whole[(slice(None),) * shard.dim + (own,)] for own in shard.slices], shard.dim)

    def _mapped(self, name: str, kind: str) -> Tensor:
        """A whole tensor in a mapping that lasts as long as it does: only what is used of it is read."""
        file_name = self.manifest.tensors[name].files[kind]
        try:
            with safe_open(self.path / file_name, framework="pt", device="cpu") as file:
                tensor: Tensor = file.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise DamagedCheckpointError(f"{self.path / file_name}: damaged ({error})") from None
        return tensor

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Yield every logical tensor's name and weights."""
        for name in self.manifest.tensors:
            yield name, self.tensor(name)
