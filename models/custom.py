"""A user's own model: a function that returns a list of layer specs."""

from __future__ import annotations

import difflib
import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipekit.config import Config
from pipekit.errors import ConfigError
from pipekit.specs import LayerSpec


def load_object(path: str, *, key: str) -> Any:
    """Import what `package.module:name` names; the working directory is on the import path.

    Args:
        path: module and name, separated by a colon.
        key: the configuration key that gave it, for messages.

    Raises:
        ConfigError: if the module or the name in it is not there.
    """
    module_name, _, name = path.partition(":")
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.insert(0, here)
    try:
        found: Any = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not (module_name + ".").startswith(error.name + "."):
            raise
        raise ConfigError(
            f"{key}={path}: no module named {error.name!r} in the working directory ({here}) or the environment; start "
            "pipekit where the module lies, or install its package"
        ) from None
    for part in name.split("."):
        if not hasattr(found, part):
            close = difflib.get_close_matches(part, dir(found), n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise ConfigError(f"{key}={path}: {getattr(found, '__file__', module_name)} has no {part!r}{hint}")
        found = getattr(found, part)
    return found


def build_custom(config: Config) -> list[LayerSpec]:
    """Return the layer specs of the user's own builder, called as `builder(config)`.

    Raises:
        ConfigError: if the builder cannot be imported, or returns something else than a list of layer specs.
    """
    path = config.model.builder  # type: ignore[union-attr]
    builder: Callable[[Config], Any] = load_object(path, key="model.builder")
    if not callable(builder):
        raise ConfigError(f"model.builder={path}: is {type(builder).__name__}, not a function; write def {path.split(':')[1]}(config)")
    specs = builder(config)
    if not isinstance(specs, (list, tuple)) or not specs:
        raise ConfigError(
            f"model.builder={path}: returned {_describe(specs)}; it must return a list of LayerSpec, one for each layer"
        )
    for layer_idx, spec in enumerate(specs):
        if not isinstance(spec, LayerSpec):
            raise ConfigError(
                f"model.builder={path}: layer {layer_idx} is {_describe(spec)}; write LayerSpec(nn.Linear, 4, 2), the class "
                "and its arguments, so that only the rank that owns the layer builds it"
            )
    return list(specs)


def _describe(value: object) -> str:
    return "an empty list" if value in ([], ()) else f"{type(value).__name__}"
