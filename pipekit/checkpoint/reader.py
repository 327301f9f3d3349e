"""Reading a checkpoint's tensors, one at a time, straight from the mapped files."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from pipekit.checkpoint.manifest import WEIGHTS, Manifest, load_manifest
from pipekit.errors import CheckpointError
from pipekit.tensor_parallel.shards import Shard


class CheckpointReader:
    """A whole checkpoint, open for reading; `path` is its folder.

    Raises:
        CheckpointError: if it is not there, or cut short.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.manifest: Manifest = load_manifest(path)
        self._files: dict[str, Any] = {}

    def tensor(self, name: str, kind: str = WEIGHTS, *, shard: Shard | None = None) -> Tensor:
        """Return a logical tensor's weights, or one of its optimizer states.

        Args:
            name: logical name.
            kind: `weights`, or the name of an optimizer state.
            shard: the shard to read; by default the whole tensor.

        Raises:
            CheckpointError: if the checkpoint does not hold it.
        """
        entry = self.manifest.tensors.get(name)
        if entry is None or kind not in entry.files:
            raise CheckpointError(f"{self.path}: holds no {kind} of {name!r}; it was written by another model")
        file_name = entry.files[kind]
        try:
            if file_name not in self._files:
                self._files[file_name] = safe_open(self.path / file_name, framework="pt", device="cpu")
            if shard is None:
                tensor: Tensor = self._files[file_name].get_tensor(name)
            else:
                stored = self._files[file_name].get_slice(name)
                indices = [(slice(None),) * shard.dim + (own,) for own in shard.slices]
                tensor = torch.cat([stored[index] for index in indices], shard.dim)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{self.path / file_name}: damaged ({error})") from None
        return tensor

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Yield every logical tensor's name and weights."""
        for name in self.manifest.tensors:
            yield name, self.tensor(name)
