"""Activation checkpointing: which layers to recompute in the backward, and where to keep their inputs."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Annotated, Any, Literal

from pydantic import Field, PositiveInt, model_validator

from pipekit.errors import ConfigError
from pipekit.settings.base import Section

KEY = "train.activation_checkpointing"

_Patterns = Annotated[tuple[Annotated[str, Field(min_length=1)], ...], Field(strict=False, min_length=1)]


class ActivationCheckpointing(Section):
    """Activation checkpointing: layers to recompute in the backward from their inputs, and where to keep the inputs."""

    every: PositiveInt = Field(default=1, examples=[2])
    """Recompute only the layers whose index is a multiple of this number; the first layer of the model has index 0."""

    layers: _Patterns | None = Field(default=None, examples=[["blocks.*.mlp"]])
    """Recompute the layers with these names, where `*` stands for any text."""

    only: Literal["attention"] | None = None
    """`attention` recomputes only the attention core, from queries, keys and values to weighted sums, and keeps
    everything else."""

    partition: bool = False
    """Each tensor-parallel rank keeps its shard of an input, and gathers the other shards before the recomputation. For
    `parallel.tp` > 1 without `parallel.sequence_parallel`, which already shards inputs."""

    offload: bool = False
    """Keep inputs in host memory. On GPUs the copies there and back overlap with the computation."""

    @model_validator(mode="before")
    @classmethod
    def _list_one_pattern(cls, values: Any) -> Any:
        if isinstance(values, dict) and isinstance(values.get("layers"), str):
            return {**values, "layers": [values["layers"]]}
        return values

    @model_validator(mode="after")
    def _check(self) -> ActivationCheckpointing:
        if self.layers is not None and self.every > 1:
            raise ValueError(
                f"every={self.every} and layers={list(self.layers)} both choose layers; remove one of them"
            )
        if self.only and (self.partition or self.offload):
            name = "partition" if self.partition else "offload"
            raise ValueError(
                f"{name}=true does not go with only={self.only}: it is about the inputs of layers that are recomputed "
                f"whole, and only={self.only} keeps queries, keys and values, of which each rank has its own heads; "
                f"remove {name} or only"
            )
        return self

    def chosen(self, names: Sequence[str]) -> list[bool]:
        """True for each layer that is recomputed, whole or in part, given the names of all layers of the model.

        Raises:
            ConfigError: if a pattern matches no layer.

        Example:
            >>> ActivationCheckpointing(layers="blocks.*").chosen(["embed", "blocks.0", "blocks.1", "head"])
            [False, True, True, False]
        """
        if self.layers is None:
            return [layer_idx % self.every == 0 for layer_idx in range(len(names))]
        for pattern in self.layers:
            if not any(fnmatchcase(name, pattern) for name in names):
                close = difflib.get_close_matches(pattern, names, n=1)
                remedy = f"try {close[0]!r}" if close else f"names are such as {', '.join(map(repr, names[:3]))}"
                raise ConfigError(
                    f"{KEY}.layers: {pattern!r} matches none of the model's {len(names)} layers; {remedy}"
                )
        return [any(fnmatchcase(name, pattern) for pattern in self.layers) for name in names]

    def written(self) -> bool | dict[str, Any]:
        """Shortest form of the setting in a configuration: true, or the keys whose values are not the defaults."""
        return self.model_dump(mode="json", exclude_defaults=True) or True

    def __str__(self) -> str:
        written = self.written()
        if isinstance(written, bool):
            return "checkpointing"
        texts = {key: " ".join(value) if isinstance(value, list) else value for key, value in written.items()}
        words = (key if text is True else f"{key}={text}" for key, text in texts.items())
        return f"checkpointing {' '.join(words)}"


def read_setting(value: bool | Mapping[str, Any]) -> ActivationCheckpointing | None:
    """Read a setting in the form that `ActivationCheckpointing.written` returns, or false.

    Example:
        >>> read_setting({"every": 2}).written(), read_setting(False)
        ({'every': 2}, None)
    """
    if isinstance(value, bool):
        return ActivationCheckpointing() if value else None
    return ActivationCheckpointing.model_validate(value)
