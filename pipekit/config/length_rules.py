"""Rules of the length of a training: `train.steps`, `train.tokens` and `train.epochs`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from pipekit.config.growth_rules import growth_is_sound
from pipekit.settings.base import Fault, rule_fault, show

if TYPE_CHECKING:
    from pipekit.config.data_config import DataConfig
    from pipekit.config.schema import TrainConfig

LENGTH_KEYS = ("steps", "tokens", "epochs")
"""Keys of `train` that say how long it is, of which one is given."""


def length_is_given_once(train: TrainConfig) -> Iterator[Fault]:
    """A training is so many steps, tokens or epochs long."""
    given = [key for key in LENGTH_KEYS if vars(train)[key] is not None]
    if not given:
        yield rule_fault(
            "train.steps",
            "train.steps: missing, and it has no default; for example steps: 300, or in its place tokens or epochs",
        )
    elif len(given) > 1 and growth_is_sound(train):
        values = " and ".join(f"train.{key}={show(vars(train)[key])}" for key in given)
        yield rule_fault(
            " ".join(f"train.{key}" for key in reversed(given)),
            f"{values} each say how long the training is; remove {'one' if len(given) == 2 else 'two'} of them",
        )


def epochs_fit_data(train: TrainConfig, data: DataConfig) -> Iterator[Fault]:
    """The sources of a mixture have epochs of their own."""
    if train.epochs is not None and data.mixture is not None:
        yield rule_fault(
            "train.epochs data.mixture",
            f"train.epochs={show(train.epochs)} does not go with data.mixture, of whose sources some are read more "
            "often than others; give train.steps or train.tokens",
        )


LENGTH_RULES: tuple[tuple[tuple[str, ...], Callable[..., Iterator[Fault]]], ...] = (
    (("train",), length_is_given_once),
    (("train", "data"), epochs_fit_data),
)
