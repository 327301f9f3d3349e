"""A configuration of DeepSpeed's, as a mapping or a JSON file: reading it, and finding what is wrong with it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from pipekit.config.deepspeed_keys import (
    DEEPSPEED_KEYS,
    TREATMENTS,
    VALUE_TYPES,
    Caller,
    KeyTree,
    is_refused,
)
from pipekit.errors import ConfigError
from pipekit.settings.base import Fault, alternatives, show
from pipekit.settings.faults import rule_of
from pipekit.settings.suggest import closest

AUTO = "auto"
"""Value that stands for pipekit's own."""


def read_deepspeed_json(path: str | Path) -> dict[str, Any]:
    """Read a DeepSpeed configuration from its JSON file.

    Raises:
        ConfigError: if it cannot be read, is not a JSON object, or gives a key twice in one object.
    """
    try:
        config = json.loads(Path(path).read_text(encoding="utf-8"), object_pairs_hook=_refuse_duplicates)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read as a DeepSpeed configuration: {error}") from None
    if not isinstance(config, dict):
        raise ConfigError(f"{path}: must be a mapping, and is {type(config).__name__}")
    return config


def _refuse_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for key, value in pairs:
        if key in values:
            raise ValueError(f"{key} is given twice, as {show(values[key])} and {show(value)}; remove one of them")
        values[key] = value
    return values


def without_auto(section: Mapping[str, Any]) -> dict[str, Any]:
    """Return a configuration without the keys whose value is `auto`.

    Example:
        >>> without_auto({"bf16": {"enabled": "auto"}, "zero_optimization": {"stage": 2, "overlap_comm": "auto"}})
        {'bf16': {}, 'zero_optimization': {'stage': 2}}
    """
    return {
        key: without_auto(value) if isinstance(value, Mapping) else value
        for key, value in section.items()
        if value != AUTO
    }


def check_deepspeed(section: Mapping[str, Any], caller: Caller, *, owner: str = "") -> Iterator[Fault]:
    """Yield a fault for each key that DeepSpeed does not know or that cannot take effect, and for each wrong value.

    Args:
        section: the configuration, perhaps with `auto` for values.
        caller: the user of the configuration.
        owner: what stands before each key in messages, such as `deepspeed.`.

    Example:
        >>> [fault.message for fault in check_deepspeed({"zero_optimisation": {"stage": 1}}, "module")]
        ["zero_optimisation: unknown key; did you mean 'zero_optimization'?"]
        >>> [fault.message for fault in check_deepspeed({"wall_clock_breakdown": "maybe"}, "run")]
        ['wall_clock_breakdown=maybe: must be true or false']
    """
    return _check(section, DEEPSPEED_KEYS, (), caller, owner)


def check_passed_on(section: Mapping[str, Any]) -> Iterator[Fault]:
    """Yield the faults of a run's `deepspeed` section, from which the keys that pipekit has itself have been taken."""
    for path, treatment in TREATMENTS.items():
        if treatment.ours and _find(section, path.split(".")) is not None:
            shown = f"deepspeed.{path}"
            message = f"{shown}: pipekit sets this itself; use {treatment.ours} instead"
            yield Fault(("deepspeed", *path.split(".")), message)
            return
    yield from check_deepspeed(section, "run", owner="deepspeed.")


def _find(section: Any, path: list[str]) -> Any:
    for key in path:
        if not isinstance(section, Mapping):
            return None
        section = section.get(key)
    return section


def _check(
    section: Mapping[str, Any], known: KeyTree, parents: tuple[str, ...], caller: Caller, owner: str
) -> Iterator[Fault]:
    for key, value in section.items():
        path = (*parents, str(key))
        name = ".".join(path)
        shown, place = f"{owner}{name}", ("deepspeed", *path)
        if key not in known:
            yield Fault(place, f"{shown}: unknown key; {_remedy(str(key), known, parents, owner)}")
        elif value == AUTO:
            continue
        elif (below := known[key]) is not None:
            if isinstance(value, Mapping):
                yield from _check(value, below, path, caller, owner)
            elif value is not None:
                example = next(iter(sorted(below)))
                yield Fault(place, f"{shown}={show(value)}: must be a mapping; for example {key}: {{{example}: ...}}")
        elif value is None and TREATMENTS[name].ours:
            continue
        elif not _takes(name, value):
            yield Fault(place, f"{shown}={show(value)}: must be {rule_of(VALUE_TYPES[name])}")
        elif value is not None and is_refused(name, value, caller):
            given = shown if isinstance(value, (Mapping, list)) else f"{shown}={show(value)}"
            yield Fault(place, f"{given}: has no effect here, since {TREATMENTS[name].refusal}; remove it")


def _remedy(key: str, known: KeyTree, parents: tuple[str, ...], owner: str) -> str:
    if match := closest(key, known):
        return f"did you mean '{owner}{'.'.join((*parents, match))}'?"
    if parents:
        return f"{owner}{'.'.join(parents)} has {alternatives(sorted(known), last='and')}"
    return "see https://www.deepspeed.ai/docs/config-json/ for the keys of DeepSpeed"


@cache
def _adapter(key: str) -> TypeAdapter[Any]:
    return TypeAdapter(VALUE_TYPES[key])


def _takes(key: str, value: Any) -> bool:
    try:
        _adapter(key).validate_python(value)
    except ValidationError:
        return False
    return True
