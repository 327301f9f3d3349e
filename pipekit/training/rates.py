"""The learning rate and the momentum that a configuration gives each step."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable

from pipekit.config import Config
from pipekit.errors import ConfigError
from pipekit.models.custom import load_object
from pipekit.optimizers.learning_rates import SCHEDULES, Schedule


def bind_schedule(config: Config) -> tuple[Callable[[int], float], Callable[[int], float | None]]:
    """Return the learning rate and the momentum as functions of the number of updates so far.

    Raises:
        ConfigError: if a function of the user's cannot be imported, or does not take its arguments.
    """
    schedule = SCHEDULES.get(config.scheduler.type) or _load(config)
    section = {
        "warmup_steps": config.warmup_steps,
        "decay_steps": config.decay_steps,
        "min_lr_ratio": config.scheduler.min_lr_ratio,
    }
    return schedule.bind(peak=config.optimizer.lr, section=section, args=config.scheduler.args)


def checked_rate(rate: float, step: int, config: Config) -> float:
    """Return a learning rate unchanged; raises a ConfigError if a user's function returned something else."""
    if not isinstance(rate, (int, float)) or not math.isfinite(rate) or rate < 0:
        raise ConfigError(
            f"scheduler.type={config.scheduler.type} returns {rate!r} after {step} steps; it must return a number that "
            "is at least 0"
        )
    return float(rate)


def _load(config: Config) -> Schedule:
    key, args = f"scheduler.type={config.scheduler.type}", config.scheduler.args
    function = load_object(config.scheduler.type, key="scheduler.type")
    if not callable(function):
        raise ConfigError(f"{key}: must be a function of the step that returns the learning rate")
    parameters = inspect.signature(function).parameters
    takes_all = any(each.kind is inspect.Parameter.VAR_KEYWORD for each in parameters.values())
    if unknown := [name for name in args if name not in parameters and not takes_all]:
        raise ConfigError(f"{key} takes no argument {unknown[0]!r}, which scheduler.args gives; remove it")
    return Schedule(function)
