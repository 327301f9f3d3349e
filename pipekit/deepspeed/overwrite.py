"""Overwriting a DeepSpeed configuration, a JSON file or a dict, with other values."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pipekit.config.deepspeed_json import read_deepspeed_json
from pipekit.errors import ConfigError
from pipekit.settings.base import config_error, show
from pipekit.settings.suggest import closest


def overwrite_deepspeed_config(
    base: str | Path | Mapping[str, Any], overrides: Mapping[str, Any], *, allow_new: bool = False
) -> dict[str, Any]:
    """Overwrite values of a DeepSpeed configuration, and return the result as a new dict.

    Sections are merged at any depth; any other value, such as a list, replaces the value in `base`. None may replace a
    section, and a section may replace None.

    Args:
        base: the configuration, or the path of its JSON file.
        overrides: values to overwrite, nested as in `base`.
        allow_new: whether `overrides` may have keys that are not in `base`.

    Raises:
        ConfigError: if the file cannot be read or has a duplicate key; or if `overrides` has keys that are not in
            `base`, or would turn a section into a value or the other way round. It lists every mistake.

    Example:
        >>> base = {"train_batch_size": 8, "zero_optimization": {"stage": 1, "overlap_comm": True}}
        >>> overwrite_deepspeed_config(base, {"zero_optimization": {"stage": 2}})
        {'train_batch_size': 8, 'zero_optimization': {'stage': 2, 'overlap_comm': True}}
        >>> overwrite_deepspeed_config(base, {"zero_optimisation": {"stage": 2}})
        Traceback (most recent call last):
        ...
        pipekit.errors.ConfigError: zero_optimisation: the base has no such key; did you mean 'zero_optimization'? ...
    """
    where = "the base"
    if not isinstance(base, Mapping):
        where, base = str(base), read_deepspeed_json(base)
    if not isinstance(overrides, Mapping):
        raise ConfigError(f"overrides={show(overrides)}: must be a mapping of keys, such as {{'train_batch_size': 8}}")
    faults = list(_find_faults(base, overrides, (), allow_new=allow_new, where=where, whole=base))
    if faults:
        raise config_error(faults)
    return copy.deepcopy(merge_sections(base, overrides))


def merge_sections(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Merge nested sections; the values of `over` replace those of `base`.

    Example:
        >>> merge_sections({"a": {"b": 1, "c": 2}}, {"a": {"c": 3}, "d": 4})
        {'a': {'b': 1, 'c': 3}, 'd': 4}
    """
    merged = dict(base)
    for key, value in over.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = merge_sections(merged[key], value) if both else value
    return merged


def _find_faults(
    base: Mapping[str, Any],
    overrides: Mapping[str, Any],
    parents: tuple[str, ...],
    *,
    allow_new: bool,
    where: str,
    whole: Mapping[str, Any],
) -> Iterator[str]:
    for key, value in overrides.items():
        path = (*parents, str(key))
        name = ".".join(path)
        if key not in base:
            if not allow_new:
                match = closest(str(key), base)
                meant = ".".join((*parents, match)) if match else _path_of(str(key), whole)
                hint = f"did you mean '{meant}'? " if meant else ""
                yield f"{name}: {where} has no such key; {hint}allow_new=True adds it"
            continue
        old = base[key]
        if isinstance(old, Mapping) and isinstance(value, Mapping):
            yield from _find_faults(old, value, path, allow_new=allow_new, where=where, whole=whole)
        elif isinstance(old, Mapping) and value is not None:
            yield f"{name}={show(value)}: must be a mapping, since {where} has a section of that name"
        elif isinstance(value, Mapping) and old is not None:
            yield f"{name}: must be a value, not a section, since {where} has {name}={show(old)}"


def _path_of(key: str, section: Mapping[str, Any]) -> str | None:
    """Return the dotted path of a key in any nested section, or None."""
    for name, below in section.items():
        if isinstance(below, Mapping):
            rest = key if key in below else _path_of(key, below)
            if rest is not None:
                return f"{name}.{rest}"
    return None
