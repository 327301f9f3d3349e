"""Models between our names and those of Hugging Face `transformers`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from pipekit.errors import CheckpointError, ConfigError
from pipekit.models import find_families
from pipekit.models.custom import CustomDoor
from pipekit.models.family import TransformerFamily
from pipekit.settings.base import alternatives


def to_hf(model: TransformerFamily | CustomDoor, tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Yield each tensor under their name and in their order of elements."""
    for rename in model.hf_renames():
        tensor = tensors[rename.ours]
        if rename.pattern is not None:
            tensor = rearrange(tensor, rename.pattern, **rename.sizes)
        parts = torch.split(tensor, list(rename.rows.values())) if rename.rows else [tensor]
        for name, part in zip(rename.names, parts, strict=True):
            yield name, part.contiguous()


def from_hf(model: TransformerFamily, tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Yield each tensor under our name and in our order of elements; a CheckpointError if one is missing.

    The names may lack what is before the first dot, as in the released GPT-2 files of the model without its head.
    """
    for rename in model.hf_renames():
        parts = []
        for name in rename.names:
            bare = name.partition(".")[2]
            theirs = name if name in tensors else bare
            if theirs not in tensors:
                raise CheckpointError(
                    f"{name} is missing: the file does not hold the {model.hf_class} of its config.json"
                )
            parts.append(tensors[theirs])
        tensor = torch.cat(parts) if len(parts) > 1 else parts[0]
        if rename.pattern is not None:
            left, right = rename.pattern.split(" -> ")
            tensor = rearrange(tensor, f"{right} -> {left}", **rename.sizes)
        yield rename.ours, tensor.contiguous()


def read_hf_config(stored: Mapping[str, Any], *, where: str) -> TransformerFamily:
    """Model that a `config.json` describes; a ConfigError if it is of no family here, or other layers compute it."""
    families = {family.hf_model_type: family for family in find_families().values()}
    kind = stored.get("model_type")
    family = families.get(str(kind))
    if family is None:
        known = alternatives(map(repr, families))
        raise ConfigError(f"{where}/config.json: model_type={kind!r}; only {known} is known")
    return family.from_hf_config(stored, where=where)
