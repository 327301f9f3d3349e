"""The configuration of an experiment of Determined's as the configuration of a trial."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from pipekit.errors import ConfigError
from pipekit.settings.base import show

_logger = logging.getLogger(__name__)

_PERIODS = {
    "searcher.max_length": "max_length",
    "min_validation_period": "validation_period",
    "min_checkpoint_period": "checkpoint_period",
    "scheduling_unit": "reporting_period",
}
_UNITS = {"batches": "batches", "records": "samples", "epochs": "epochs"}
_VALUES = {
    "entrypoint": "trial",
    "data": "data",
    "reproducibility.experiment_seed": "seed",
    "resources.slots_per_trial": "run.processes",
    "checkpoint_policy": "fit.checkpoint_policy",
    "searcher.metric": "fit.best_metric",
    "perform_initial_validation": "fit.step_zero_validation",
    "profiling.enabled": "fit.profiling_enabled",
}
_OWN = ("trial", "seed", "run", "fit")


def trial_config(experiment: Mapping[str, Any]) -> dict[str, Any]:
    """Return the configuration of a trial, as `pipekit train` reads it, for an experiment of Determined's.

    Keys without a counterpart, such as `resources.resource_pool`, are left out, and named in the log. Those that are
    pipekit's already, such as `run`, stay.

    Args:
        experiment: the content of the experiment's YAML file.

    Raises:
        ConfigError: if a hyperparameter is a range to search, or a period has an unknown unit.

    Example:
        >>> trial_config({"hyperparameters": {"lr": {"type": "const", "val": 0.1}}, "searcher": {"max_length": {
        ...     "batches": 100}}, "min_validation_period": {"records": 64}})  # doctest: +NORMALIZE_WHITESPACE
        {'hyperparameters': {'lr': 0.1},
         'fit': {'max_length': {'batches': 100}, 'validation_period': {'samples': 64}}}
    """
    config: dict[str, Any] = {}
    left_out = []
    for key, value in _leaves(experiment):
        if key == "hyperparameters":
            config["hyperparameters"] = _constants(value, key)
        elif key in _PERIODS:
            if period := _period(value, key):
                _put(config, f"fit.{_PERIODS[key]}", period)
        elif key in _VALUES:
            _put(config, _VALUES[key], value)
        elif key == "searcher.smaller_is_better":
            _put(config, "fit.best_is", "lowest" if value else "highest")
        elif key in _OWN:
            config[key] = {**config.get(key, {}), **value} if isinstance(value, Mapping) else value
        else:
            left_out.append(key)
    if left_out:
        _logger.info("of the experiment's configuration, pipekit has no use for %s", ", ".join(left_out))
    return config


def _leaves(experiment: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Keys and values, with those of Determined's sections under names such as `searcher.metric`."""
    found = []
    for key, value in experiment.items():
        if isinstance(value, Mapping) and any(name.startswith(f"{key}.") for name in (*_PERIODS, *_VALUES)):
            found += [(f"{key}.{below}", content) for below, content in value.items()]
        else:
            found.append((str(key), value))
    return found


def _constants(value: Any, where: str) -> Any:
    """Hyperparameters without `{type: const, val: ...}` around their values."""
    if not isinstance(value, Mapping):
        return value
    if value.get("type") == "const" and "val" in value:
        return value["val"]
    if value.get("type") in ("int", "double", "log", "categorical"):
        raise ConfigError(f"{where}={show(dict(value))}: a range to search, and pipekit searches none; give one value")
    return {name: _constants(below, f"{where}.{name}") for name, below in value.items()}


def _period(value: Any, where: str) -> dict[str, Any] | None:
    """A period of pipekit's; None where it is 0, which means none."""
    if isinstance(value, int):
        value = {"batches": value}
    if not (isinstance(value, Mapping) and len(value) == 1 and set(value) <= set(_UNITS)):
        raise ConfigError(f"{where}={show(value)}: must be a number of one unit; for example {where}: {{batches: 100}}")
    ((unit, number),) = value.items()
    return {_UNITS[unit]: number} if number else None


def _put(config: dict[str, Any], path: str, value: Any) -> None:
    section, _, key = path.rpartition(".")
    (config.setdefault(section, {}) if section else config)[key] = value
