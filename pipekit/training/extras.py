"""Extras of the installation that a configuration needs, looked for before any process starts."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec

from pipekit.errors import ConfigError

_EXTRAS = {
    "logging.tensorboard": ("tensorboard", "tensorboard"),
    "callbacks.tensorboard": ("tensorboard", "tensorboard"),
    "logging.trackio": ("trackio", "trackio"),
    "callbacks.trackio": ("trackio", "trackio"),
    "callbacks.loss_curve": ("matplotlib", "plot"),
    "callbacks.lm_eval": ("lm_eval", "eval"),
}
"""Module and extra that each key needs where it is switched on."""


def check_extras(sections: Mapping[str, object]) -> None:
    """Check that what the keys of `logging` and `callbacks` need is installed.

    Args:
        sections: these sections by name.

    Raises:
        ConfigError: if not; it says what to install.
    """
    for key, (module, extra) in _EXTRAS.items():
        section, _, name = key.partition(".")
        if getattr(sections.get(section), name, None) and find_spec(module) is None:
            raise ConfigError(
                f"{key}: {module} is not installed; run pip install 'pipekit[{extra}]', or leave {key} out"
            )
