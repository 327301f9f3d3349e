"""Sources of a run's configuration: a YAML file, a dict, or a `Config`, with changes to single keys."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pipekit.config.load import load_config, parse_config
from pipekit.config.schema import Config
from pipekit.config.stored_code import check_stored_code
from pipekit.config.trial_config import TrialConfig, load_trial_config, names_trial, parse_trial_config
from pipekit.errors import ConfigError

ConfigSource = str | Path | Mapping[str, Any] | Config
"""A YAML file's path, a nested dict with its keys, or a configuration."""

Changes = Iterable[str] | Mapping[str, Any]
"""Changes to single keys: texts such as "train.steps=20", or a dict such as `{"train.steps": 20}`."""


def read_config(source: ConfigSource, changes: Changes = (), *, trust_code: bool = False) -> Config:
    """Read the configuration of a run of layers.

    Args:
        source: the source of the configuration.
        changes: changes to single keys.
        trust_code: whether to run code that a `config.yaml` in the folder of a run or a checkpoint names.

    Raises:
        ConfigError: if there are mistakes; it lists all of them.

    Example:
        >>> values = {"model": {"preset": "tiny"}, "train": {"steps": 300}}
        >>> read_config(values, {"train.steps": 20, "optimizer.lr": 1e-5}).train.steps
        20
    """
    overrides = write_overrides(changes)
    if isinstance(source, (Mapping, Config)):
        return parse_config(source, overrides)
    check_stored_code(source, overrides, trust_code=trust_code)
    return load_config(source, overrides)


def read_run_config(source: ConfigSource, changes: Changes = (), *, trust_code: bool = False) -> Config | TrialConfig:
    """Read the configuration of a run: a `TrialConfig` if it has the key `trial`; see `read_config`."""
    overrides = write_overrides(changes)
    is_trial = any(override.startswith("trial=") for override in overrides)
    if isinstance(source, Config):
        return read_config(source, overrides)
    if isinstance(source, Mapping):
        parse = parse_trial_config if is_trial or "trial" in source else parse_config
        return parse(source, overrides)
    check_stored_code(source, overrides, trust_code=trust_code)
    return load_trial_config(source, overrides) if is_trial or names_trial(source) else load_config(source, overrides)


def write_overrides(changes: Changes) -> list[str]:
    """Return changes as command-line texts.

    Raises:
        ConfigError: if `changes` is a single text, or has a value that YAML cannot hold.

    Example:
        >>> write_overrides({"optimizer.lr": 1e-5, "run.dir": Path("runs/a"), "train.freeze": ("embed.*",)})
        ['optimizer.lr=1e-05', 'run.dir="runs/a"', 'train.freeze=["embed.*"]']
    """
    if isinstance(changes, str):
        raise ConfigError(f'overrides={changes!r}: must be a list or a dict; for example ["{changes}"]')
    if not isinstance(changes, Mapping):
        return [*changes]
    try:
        return [f"{key}={json.dumps(value, ensure_ascii=False, default=_plain)}" for key, value in changes.items()]
    except (TypeError, ValueError) as error:
        raise ConfigError(f"overrides: {error}; use numbers, text, lists and dicts") from None


def _plain(value: object) -> Any:
    """A value that JSON does not know as one that it does: a path, and a number of numpy's or torch's."""
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "item"):
        return value.item()
    raise TypeError(f"{value!r} is a {type(value).__name__}")
