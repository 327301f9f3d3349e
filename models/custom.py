"""The user's own model: a function that returns a list of layer specs."""

from __future__ import annotations

import importlib
import inspect
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field, field_validator, model_validator

from pipekit.errors import ConfigError
from pipekit.models.family import ModelFamily, TransformerFamily
from pipekit.settings.suggest import closest

if TYPE_CHECKING:
    from pipekit.config import Config
    from pipekit.layers.specs import LayerSpec


class CustomModelConfig(ModelFamily):
    """The user's own model: a function that returns a list of layer specs."""

    builder: str = Field(examples=["my_package.my_model:build_layers"])
    """`package.module:function`; called as `function(config)`, it returns a list of `LayerSpec`."""

    args: dict[str, Any] = Field(default={}, examples=[{"width": 64}])
    """Anything that the function wants to read, as `config.model.args`."""

    @property
    def description(self) -> str:
        return self.builder

    def build_layers(self, config: Config) -> list[LayerSpec]:
        where = f"model.builder={self.builder}"
        builder: Callable[[Config], Any] = load_object(self.builder, key="model.builder")
        if not callable(builder):
            raise ConfigError(f"{where}: is {_describe(builder)}, and must be a function that takes the configuration")
        try:
            signature = inspect.signature(builder)
            signature.bind(config)
        except TypeError:
            raise ConfigError(
                f"{where}: is called with one argument, the configuration, and takes {signature}; write "
                f"def {self.builder.rpartition(':')[2]}(config), and read model.args as config.model.args"
            ) from None
        except ValueError:  # tells no signature
            pass
        specs = builder(config)
        check_specs(specs, where=f"{where}: it")
        return list(specs)

    def no_export_reason(self) -> str | None:
        return f"is built by {self.builder}, which has no counterpart in transformers"

    @classmethod
    def unknown_key_remedy(cls, key: str) -> str | None:
        known = key in TransformerFamily.model_fields
        return f"the settings of your own model stand under model.args, as model.args.{key}" if known else None

    @model_validator(mode="before")
    @classmethod
    def _from_string(cls, values: Any) -> Any:
        return {"builder": values} if isinstance(values, str) else values

    @field_validator("builder")
    @classmethod
    def _names_a_function(cls, builder: str) -> str:
        if not re.fullmatch(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*(\.[A-Za-z_]\w*)*", builder):
            raise ValueError(
                "must name a function as package.module:function; for example builder: my_package.my_model:build_layers"
            )
        return builder


def load_object(path: str, *, key: str) -> Any:
    """Object that the `key` of a configuration names as `package.module:name`, also in the working directory.

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


def check_specs(specs: Sequence[LayerSpec], *, where: str) -> None:
    """Check that a user's function returned a model; `where` is the subject of the sentence in messages.

    Raises:
        ConfigError: if it is not a list or tuple of layer specs with one at least.
    """
    from pipekit.layers.specs import LayerSpec

    if not isinstance(specs, (list, tuple)) or not specs:
        what = "an empty list" if isinstance(specs, (list, tuple)) else _describe(specs)
        raise ConfigError(f"{where} returned {what}, and must return a list of LayerSpec, one for each layer")
    for layer_idx, spec in enumerate(specs):
        if not isinstance(spec, LayerSpec):
            raise ConfigError(f"{where} returned {_describe(spec)} as layer {layer_idx}; {_instead_of(spec)}")


def _describe(value: object) -> str:
    if isinstance(value, type):
        return f"the class {value.__name__}"
    return "None" if value is None else f"{value!r}" if isinstance(value, (str, int)) else type(value).__name__


def _instead_of(layer: object) -> str:
    """Text to write in place of something that is no layer spec."""
    from torch import nn

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
