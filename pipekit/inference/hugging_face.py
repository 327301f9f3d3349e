"""Models between our names and those of Hugging Face `transformers`, and the folders that hold them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path

import torch
from einops import rearrange
from torch import Tensor

from pipekit.errors import CheckpointError
from pipekit.inference.safetensors_folder import SafetensorsFolder
from pipekit.layers.sequential import SequentialModel
from pipekit.models.custom import CustomDoor
from pipekit.models.family import TensorRename, TransformerFamily
from pipekit.models.imported import read_hf_config, read_hf_folder
from pipekit.tensor_parallel.shards import Shard

__all__ = ["HuggingFaceFolder", "from_hf", "read_hf_config", "to_hf"]

# Constants that older files hold beside the weights.
_CONSTANTS = (".attn.bias", ".attn.masked_bias", ".attention.bias", ".attention.masked_bias", ".rotary_emb.inv_freq")
_HEAD = "lm_head.weight"


def to_hf(model: TransformerFamily | CustomDoor, tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Yield each tensor under their name and in their order of elements."""
    for rename in model.hf_renames():
        for name, part in theirs_of(rename, tensors[rename.ours]).items():
            yield name, part.contiguous()


def from_hf(model: TransformerFamily, tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Yield each tensor under our name and in our order of elements; a CheckpointError if one is missing.

    The names may lack what is before the first dot, as in the released GPT-2 files of the model without its head.
    """
    for rename in model.hf_renames():
        yield rename.ours, ours_of(rename, [tensors[name] for name in _find(rename, tensors, model)])


def theirs_of(rename: TensorRename, tensor: Tensor) -> dict[str, Tensor]:
    """The tensors of theirs that a whole one of ours is, as views where the order of elements allows it."""
    if rename.pattern is not None:
        tensor = rearrange(tensor, rename.pattern, **rename.sizes)
    parts = torch.split(tensor, list(rename.rows.values())) if rename.rows else [tensor]
    return dict(zip(rename.names, parts, strict=True))


def ours_of(rename: TensorRename, parts: Sequence[Tensor]) -> Tensor:
    """The whole tensor of ours that some of theirs are."""
    tensor = torch.cat(list(parts)) if len(parts) > 1 else parts[0]
    if rename.pattern is not None:
        left, right = rename.pattern.split(" -> ")
        tensor = rearrange(tensor, f"{right} -> {left}", **rename.sizes)
    return tensor.contiguous()


def has_vocabulary_rows(name: str) -> bool:
    """True if the first dimension of a tensor of ours is the vocabulary, whose rows can be padded and cut."""
    return name.split(".")[0] in ("embed", "head")


class HuggingFaceFolder:
    """A model in the format of `transformers`, read a tensor or a slice at a time.

    Args:
        path: the folder.
        model: the model as its configuration here has it, with a larger vocabulary perhaps; by default as the folder's
            `config.json` describes it.

    Raises:
        CheckpointError: if the weights are in another format, or a file is missing.
        ConfigError: if pipekit has no such model.
    """

    def __init__(self, path: Path, model: TransformerFamily | None = None) -> None:
        self.path = path
        self.stored_model = read_hf_folder(path)
        self.model = model or self.stored_model
        self._stored = SafetensorsFolder(path)
        self._renames = {rename.ours: rename for rename in self.model.hf_renames()}

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of each logical tensor, with the rows that pad the vocabulary."""
        return {name: self._shape(name) for name in self._renames}

    @property
    def dtypes(self) -> dict[str, torch.dtype]:
        """Stored number format of each logical tensor."""
        return {name: self._stored.described(self._theirs(name)[0]).dtype for name in self._renames}

    @property
    def fingerprint(self) -> str:
        """Hash of the tensors as they are stored; see `SafetensorsFolder.fingerprint`."""
        return self._stored.fingerprint

    def check(self) -> None:
        """Check the settings of the model against `config.json`, and names and shapes of all tensors.

        Raises:
            CheckpointError: if a setting differs, or a tensor is missing, of another shape, or not the model's.
        """
        free = {"preset", "vocab_size", "max_positions", "dropout", "init_std", "init_from", "export_vocab_size"}
        given, stored = (model.model_dump(exclude=free) for model in (self.model, self.stored_model))
        if faults := [key for key in stored if given.get(key) != stored[key]]:
            shown = ", ".join(f"model.{key}={given.get(key)!r} (there {stored[key]!r})" for key in faults[:3])
            raise CheckpointError(
                f"model.init_from={self.path}: holds another model: {shown}; remove the sizes and write "
                "model.family=auto, which reads them there"
            )
        used = {theirs for name in self._renames for theirs in self._theirs(name)}
        unused = [name for name in self._stored if name not in used and not name.endswith(_CONSTANTS)]
        if unused := [name for name in unused if name != _HEAD or _HEAD in used or "head.weight" in self._renames]:
            raise CheckpointError(
                f"{self.path}: holds {unused[0]}{f' and {len(unused) - 1} more' if len(unused) > 1 else ''}, which "
                f"the {self.model.family} model of its config.json has not; it would be lost"
            )
        for name, tensor in SequentialModel(self.model.layer_specs(), seed=None).logical_tensors().items():
            if name in self.shapes and self.shapes[name] != tensor.shape:
                raise CheckpointError(
                    f"{self.path}: {' and '.join(self._theirs(name))} make {name} {self.shapes[name]}, and the model "
                    f"has {tuple(tensor.shape)}"
                )

    def tensor(self, name: str, *, shard: Shard | None = None) -> Tensor:
        """A logical tensor, or a shard of it, of which only that is read where the order of elements allows it.

        Raises:
            CheckpointError: if it is missing, or its file is damaged.
        """
        rename, length = self._renames[name], self.shapes[name][0]
        if shard is None or "(" in (rename.pattern or "") or (rename.pattern and rename.rows):
            whole = ours_of(rename, [self._stored[theirs] for theirs in self._theirs(name)])
            whole = _pad(whole, length)
            return whole if shard is None else shard.take(whole)
        dim = shard.dim
        if rename.pattern is not None:
            left, right = (side.split() for side in rename.pattern.split(" -> "))
            dim = right.index(left[shard.dim])
        if rename.rows and shard.dim == 0:
            pieces = [piece for own in shard.slices for piece in self._rows(name, own)]
            return torch.cat(pieces)
        parts = [_take_slices(self._stored.mapped(theirs), shard.slices, dim) for theirs in self._theirs(name)]
        return _pad(
            ours_of(rename, parts), shard.shape_of(shard.rank, self.shapes[name])[0] if shard.dim == 0 else length
        )

    def _rows(self, name: str, own: slice) -> Iterator[Tensor]:
        """Rows of a tensor that is several of theirs, one below the other."""
        begin = 0
        for theirs, num_rows in zip(self._theirs(name), self._renames[name].rows.values(), strict=True):
            first, last = max(own.start - begin, 0), min(own.stop - begin, num_rows)
            if first < last:
                yield _take_slices(self._stored.mapped(theirs), [slice(first, last)], 0)
            begin += num_rows

    def _shape(self, name: str) -> tuple[int, ...]:
        rename = self._renames[name]
        parts = [self._stored.described(theirs) for theirs in self._theirs(name)]
        expected = list(rename.rows.values())
        if rename.rows and [len(part) for part in parts] != expected:
            raise CheckpointError(f"{self.path}: {' and '.join(rename.names)} have not {expected} rows")
        rows, *others = ours_of(rename, parts).shape
        padding = self.model.known_vocab_size - self.stored_model.known_vocab_size
        return (rows + (max(0, padding) if has_vocabulary_rows(name) else 0), *others)

    def _theirs(self, name: str) -> list[str]:
        return _find(self._renames[name], self._stored, self.model)


def _take_slices(part: Tensor, slices: Sequence[slice], dim: int) -> Tensor:
    """Slices of a stored tensor along a dimension; those beyond its end are shorter or empty."""
    length = part.shape[dim]
    found = [slice(min(own.start, length), min(own.stop, length)) for own in slices]
    return torch.cat([part[(slice(None),) * dim + (own,)] for own in found], dim)


def _pad(tensor: Tensor, num_rows: int) -> Tensor:
    missing = num_rows - len(tensor)
    return torch.cat([tensor, tensor.new_zeros((missing, *tensor.shape[1:]))]) if missing > 0 else tensor


def _find(rename: TensorRename, names: Mapping[str, Tensor], model: TransformerFamily) -> list[str]:
    found = []
    for name in rename.names:
        bare = name.partition(".")[2]
        if name not in names and bare not in names:
            raise CheckpointError(f"{name} is missing: the file does not hold the {model.hf_class} of its config.json")
        found.append(name if name in names else bare)
    return found
