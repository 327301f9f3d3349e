"""A user's own model: a function that returns a list of layer specs."""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from pipekit.config import Config, CustomModelConfig
from pipekit.errors import ConfigError
from pipekit.layers.specs import LayerSpec
from pipekit.settings.suggest import closest


def load_object(path: str, *, key: str) -> Any:
    """Import what `package.module:name` names; the working directory is put on the import path.

    Args:
        path: module and name, separated by a colon.
        key: the configuration key that gave it, for messages.

    Raises:
        ConfigError: if the module, one that it imports, or the name in it is not there.
    """
    module_name, _, name = path.partition(":")
    if not module_name or not name:
        raise ConfigError(f"{key}={path}: must name a module and something in it, as package.module:name")
    # It stays there: what is imported later, inside the user's functions, is found too.
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.insert(0, here)
    try:
        found: Any = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise ConfigError(f"{key}={path}: importing {module_name} failed: {error}") from error
        raise ConfigError(
            f"{key}={path}: no module named {error.name!r} in the working directory ({here}) or the "
            "environment; start pipekit where the module lies, or install its package"
        ) from None
    for part in name.split("."):
        if not hasattr(found, part):
            match = closest(part, (attribute for attribute in dir(found) if not attribute.startswith("_")))
            hint = f"; did you mean {match!r}?" if match else ""
            where = getattr(found, "__file__", None) or module_name
            raise ConfigError(f"{key}={path}: {where} has no {part!r}{hint}")
        found = getattr(found, part)
    return found


def build_custom(config: Config) -> list[LayerSpec]:
    """Return the layer specs of the user's own builder, called as `builder(config)`.

    Raises:
        ConfigError: if the builder cannot be imported or called, or returns something else than a list of
            layer specs.
    """
    assert isinstance(config.model, CustomModelConfig)
    where = f"model.builder={config.model.builder}"
    builder: Callable[[Config], Any] = load_object(config.model.builder, key="model.builder")
    if not callable(builder):
        raise ConfigError(f"{where}: is {_describe(builder)}, and must be a function that takes the configuration")
    if not _takes_one_argument(builder):
        raise ConfigError(
            f"{where}: is called with one argument, the configuration, and takes "
            f"{inspect.signature(builder)}; write "
            f"def {config.model.builder.rpartition(':')[2]}(config), and read model.args as config.model.args"
        )
    specs = builder(config)
    check_specs(specs, where=f"{where}: it")
    return list(specs)


def check_specs(specs: Sequence[LayerSpec], *, where: str) -> None:
    """Check that a user's function returned a model.

    Args:
        specs: what it returned.
        where: the subject of the sentence, for messages.

    Raises:
        ConfigError: if it is not a list or tuple of layer specs with one at least.
    """
    if not isinstance(specs, (list, tuple)) or not specs:
        what = "an empty list" if isinstance(specs, (list, tuple)) else _describe(specs)
        raise ConfigError(f"{where} returned {what}, and must return a list of LayerSpec, one for each layer")
    for layer_idx, spec in enumerate(specs):
        if not isinstance(spec, LayerSpec):
            raise ConfigError(f"{where} returned {_describe(spec)} as layer {layer_idx}; {_instead_of(spec)}")


def _takes_one_argument(function: Callable[..., Any]) -> bool:
    try:
        inspect.signature(function).bind(None)
    except TypeError:
        return False
    except ValueError:  # tells no signature
        return True
    return True


def _describe(value: object) -> str:
    if isinstance(value, type):
        return f"the class {value.__name__}"
    return "None" if value is None else f"{value!r}" if isinstance(value, (str, int)) else type(value).__name__


def _instead_of(layer: object) -> str:
    """Return what to write in place of something that is no layer spec."""
    kinds = {kind.__name__ for kind in type(layer).__mro__ if kind.__module__.startswith("deepspeed.")}
    for name in ("TiedLayerSpec", "LayerSpec"):
        if name in kinds:
            return f"it is DeepSpeed's {name}: write from pipekit import {name}, which takes the same arguments"
    if isinstance(layer, type) and issubclass(layer, nn.Module):
        return f"write LayerSpec({layer.__name__}, ...) with its arguments"
    if isinstance(layer, nn.Module):
        name = type(layer).__name__
        return f"it is built already: write LayerSpec({name}, ...), so that only the rank that owns it builds it"
    if callable(layer):
        return "put the function in the forward of an nn.Module, and write LayerSpec(TheModule)"
    return "write LayerSpec(nn.Linear, 4, 2), the class and its arguments"
