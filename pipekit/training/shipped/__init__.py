"""Callbacks that ship with pipekit: one file for each, found by its key in the `callbacks` section.

For example, the file `early_stopping.py` holds the class `EarlyStopping` for the key `callbacks.early_stopping`. The
settings are described in `pipekit.config.callbacks_config`. A trial's `build_callbacks` may also return one, such as
`{"early_stopping": EarlyStopping(context, EarlyStoppingConfig(patience=5))}`, which replaces the one of that key.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from pipekit.training.shipped.shipped_callback import ShippedCallback

if TYPE_CHECKING:
    from pipekit.training.trial import Trial


def build_shipped_callbacks(trial: Trial, *, evaluates: bool) -> dict[str, ShippedCallback]:
    """Build the callbacks that the configuration of a trial switches on, by their keys.

    Args:
        trial: the trial.
        evaluates: whether the trial has validations.

    Raises:
        PipekitError: if the trial lacks something that a callback needs.
    """
    built: dict[str, ShippedCallback] = {}
    for key, setting in trial.context.config.callbacks:
        if setting is None or setting is False:
            continue
        module = import_module(f"{__name__}.{key}")
        kind = getattr(module, "".join(word.capitalize() for word in key.split("_")))
        built[key] = kind(trial.context) if setting is True else kind(trial.context, setting)
    for callback in built.values():
        callback.check(trial, evaluates=evaluates)
    return built
