"""Configuration of a model with weights: given by the user, checked against the weights, and stored with them.

A checkpoint of `pipekit train` has the configuration of its run. A checkpoint of another training loop has the user's
description of the model: a `model` section, and optionally `data.tokenizer`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipekit.config import Config, ModelConfigSource, load_model_config
from pipekit.data.tokenizer import find_tokenizer_file, load_tokenizer, tokenizer_files
from pipekit.errors import ConfigError
from pipekit.models import build_layers

if TYPE_CHECKING:
    from pipekit.layers.specs import LayerSpec

Shapes = Mapping[str, tuple[int, ...]]
"""Shapes of logical tensors by name."""


def read_model_config(source: ModelConfigSource, shapes: Shapes, *, of: object) -> Config:
    """Read the configuration of a model with known tensors, and check that it describes these tensors.

    A vocabulary size `auto` becomes that of the tokenizer. The code that `model.builder` names is run.

    Args:
        source: see `load_model_config`.
        shapes: shapes of the model's tensors.
        of: name of the tensors' owner, for messages.

    Raises:
        ConfigError: if the configuration cannot be read, or describes another model; the message names the first tensor
            that differs.
        DataError: if there is no such tokenizer.
    """
    config = load_model_config(source)
    if (tokenizer := config.data.tokenizer) is not None:
        config = config.updated(config.model.fit_vocabulary(load_tokenizer(tokenizer).vocab_size, tokenizer=tokenizer))
    config.to_yaml()  # a ConfigError where something in it cannot be stored
    where = f"{source}: " if isinstance(source, (str, Path)) else ""
    remedy = "make the model section fit"
    described = shapes_of_layers(build_layers(config))
    for name, shape in described.items():
        if name not in shapes:
            other = next((other for other in shapes if other not in described), None)
            held = f"does not hold it, but {other}" if other else "does not hold it"
            raise ConfigError(f"{where}describes a model with {name} {shape}, and {of} {held}; {remedy}")
        if shapes[name] != shape:
            raise ConfigError(
                f"{where}describes a model with {name} {shape}, and in {of} it is {shapes[name]}; {remedy}"
            )
    for name, shape in shapes.items():
        if name not in described:
            raise ConfigError(f"{where}describes a model without {name} {shape}, and {of} holds it; {remedy}")
    return config


def shapes_of_layers(specs: Sequence[LayerSpec]) -> dict[str, tuple[int, ...]]:
    """Shape of every logical tensor of a model, without allocating any."""
    from pipekit.layers.sequential import SequentialModel  # which loads torch

    return {name: tuple(held.shape) for name, held in SequentialModel(specs, seed=None).logical_tensors().items()}


def stored_sections(config: Config | None) -> dict[str, Any]:
    """Sections of `config.yaml` about the model, which `load_stored_config` reads; none if the model is unknown."""
    if config is None:
        return {}
    # The settings of DeepSpeed there are those of the training loop.
    given = config.model_dump(mode="json", exclude_defaults=True, exclude={"deepspeed", "run"})
    return {**given, "model": config.model.model_dump(mode="json")}


def files_beside(config: Config | None) -> dict[str, Path]:
    """Files of a configuration's tokenizer, by their names in a checkpoint."""
    if config is None or config.data.tokenizer is None:
        return {}
    return tokenizer_files(find_tokenizer_file(config.data.tokenizer))
