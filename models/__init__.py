"""Models as lists of layer specs: one file per family, and `transformer`, the layers that they consist of."""

from __future__ import annotations

import pkgutil
from collections.abc import Sequence
from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING

from pipekit.models.custom import CustomModelConfig, open_door
from pipekit.models.family import ModelFamily, TensorRename, TransformerFamily
from pipekit.settings.suggest import closest

if TYPE_CHECKING:
    from pipekit.config import Config
    from pipekit.layers.specs import LayerSpec

DEFAULT_FAMILY = "gpt2"
"""Default family, of a model section that names neither a family nor a preset."""


@cache
def find_families() -> dict[str, type[TransformerFamily]]:
    """Built-in families by name, from the variable `FAMILY` of the files in this folder."""
    names = [info.name for info in pkgutil.iter_modules(__path__) if not info.ispkg]
    families = [getattr(import_module(f"{__name__}.{name}"), "FAMILY", None) for name in names]
    return {family.model_fields["family"].default: family for family in families if family is not None}


def preset_families() -> dict[str, type[TransformerFamily]]:
    """Family of each preset; the default family's come first."""
    families = sorted(find_families().items(), key=lambda item: item[0] != DEFAULT_FAMILY)
    return {preset: family for _, family in families for preset in family.presets}


def family_of(values: object) -> type[ModelFamily] | None:
    """Class that reads a model section; None if the section is neither a mapping nor text.

    Text, or a mapping with `builder`, is the user's own model. Otherwise the name of the family decides, and then the
    preset, even if it is misspelt.
    """
    if isinstance(values, ModelFamily):
        return type(values)
    if isinstance(values, str):
        return CustomModelConfig
    if not isinstance(values, dict):
        return None
    if {"builder", "args"} & set(values):
        return CustomModelConfig
    families, presets = find_families(), preset_families()
    chosen = families.get(str(values.get("family")))
    named = closest(str(values.get("preset")), presets)
    return chosen or (presets[named] if named else families[DEFAULT_FAMILY])


def build_layers(config: Config) -> list[LayerSpec]:
    """Layer specs of a configuration's model; raises a ConfigError if the user's builder does not return any."""
    return config.model.build_layers(config)


def names_in_transformers(config: Config) -> list[TensorRename]:
    """Both names of every tensor of a configuration's model; none if `transformers` has no such model."""
    if config.model.no_export_reason() is not None:
        return []
    return (config.model if isinstance(config.model, TransformerFamily) else open_door(config)).hf_renames()


def adapted_layers(config: Config, specs: Sequence[LayerSpec]) -> list[LayerSpec]:
    """Layer specs of a configuration's model with the adapters of its `lora` section, if there is one."""
    from pipekit.layers.lora import add_lora
    from pipekit.tensor_parallel import LowRank

    lora = config.lora
    if lora.rank is None:
        return list(specs)
    return add_lora(specs, lora.targets, LowRank(lora.rank, lora.scale, lora.dropout), names_in_transformers(config))
