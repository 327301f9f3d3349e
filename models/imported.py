"""Models described by the `config.json` of a Hugging Face folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipekit.errors import ConfigError
from pipekit.files import parse_json, read_regular
from pipekit.models import find_families
from pipekit.models.family import TransformerFamily
from pipekit.settings.base import alternatives

HF_CONFIG_FILE = "config.json"
_MAX_BYTES = 10_000_000


def read_hf_folder(folder: Path) -> TransformerFamily:
    """Read the model that the `config.json` of a folder describes.

    Raises:
        ConfigError: if there is none, or its family or its layers are not supported.
    """
    return read_hf_config(load_hf_config(folder), where=str(folder))


def load_hf_config(folder: Path) -> dict[str, Any]:
    """Content of the `config.json` of a folder; raises a ConfigError if there is none."""
    path = folder / HF_CONFIG_FILE
    try:
        stored = parse_json(read_regular(path, max_bytes=_MAX_BYTES))
    except FileNotFoundError:
        raise ConfigError(
            f"{path}: no such file; give the folder of a Hugging Face model, which holds {HF_CONFIG_FILE} and "
            "model.safetensors (pipekit downloads none: use hf download NAME --local-dir FOLDER)"
        ) from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from None
    if not isinstance(stored, dict):
        raise ConfigError(f"{path}: holds no mapping")
    return stored


def read_hf_config(stored: Mapping[str, Any], *, where: str) -> TransformerFamily:
    """Model that a `config.json` describes; raises a ConfigError if its family or its layers are not supported."""
    families = {family.hf_model_type: family for family in find_families().values()}
    kind = stored.get("model_type")
    family = families.get(str(kind))
    if family is None:
        known = alternatives(map(repr, families))
        raise ConfigError(f"{where}/config.json: model_type={kind!r}; only {known} is known")
    return family.from_hf_config(stored, where=where)
