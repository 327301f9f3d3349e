"""The user's own model: a function that returns a list of layer specs."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import re
import sys
import sysconfig
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field, ValidationInfo, field_validator, model_validator

from pipekit.errors import ConfigError, PipekitError
from pipekit.models.family import ModelFamily, TensorRename, TransformerFamily, setting_error
from pipekit.settings.script_file import read_script
from pipekit.settings.suggest import closest

if TYPE_CHECKING:
    from pipekit.config import Config
    from pipekit.layers.specs import LayerSpec


_MAX_TEXT = 500


class CustomModelConfig(ModelFamily):
    """The user's own model: a function that returns a list of layer specs."""

    builder: str = Field(examples=["my_package.my_model:build_layers"])
    """`package.module:function`; called as `function(config)`, it returns a list of `LayerSpec`."""

    hf_names: str | None = Field(default=None, examples=["my_package.my_model:hf_names"])
    """`package.module:function`; called as `function(config)`, it returns the name in `transformers` of every logical
    tensor. With `hf_config`, such a model is exported to Hugging Face's format."""

    hf_config: str | None = Field(default=None, examples=["my_package.my_model:hf_config"])
    """`package.module:function`; called as `function(config)`, it returns the content of `config.json`."""

    args: dict[str, Any] = Field(default={}, examples=[{"width": 64}])
    """Anything else that your function needs; it reads this as `config.model.args`."""

    @property
    def description(self) -> str:
        return self.builder

    def build_layers(self, config: Config) -> list[LayerSpec]:
        where = f"model.builder={self.builder}"
        specs = call_with_config(self.builder, config, key="model.builder")
        check_specs(specs, where=f"{where}: it")
        return list(specs)

    def no_export_reason(self) -> str | None:
        if self.hf_names is not None:
            return None
        return f"is built by {self.builder}, and its configuration names no model.hf_names and model.hf_config"

    @classmethod
    def unknown_key_remedy(cls, key: str) -> str | None:
        known = key in TransformerFamily.model_fields
        return f"the settings of your own model stand under model.args, as model.args.{key}" if known else None

    @model_validator(mode="before")
    @classmethod
    def _from_string(cls, values: Any) -> Any:
        return {"builder": values} if isinstance(values, str) else values

    @field_validator("builder", "hf_names", "hf_config")
    @classmethod
    def _names_a_function(cls, function: str | None, info: ValidationInfo) -> str | None:
        pattern = r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*(\.[A-Za-z_]\w*)*"
        if function is not None and not re.fullmatch(pattern, function):
            example = "build_layers" if info.field_name == "builder" else info.field_name
            raise ValueError(
                "must name a function as package.module:function; "
                f"for example {info.field_name}: my_package.my_model:{example}"
            )
        return function

    @model_validator(mode="after")
    def _door_is_whole(self) -> CustomModelConfig:
        if (self.hf_names is None) != (self.hf_config is None):
            given, missing = ("hf_names", "hf_config") if self.hf_config is None else ("hf_config", "hf_names")
            text = f"model.{given} needs model.{missing} beside it: an export has names and a config.json; give both"
            raise setting_error(given, text)
        return self


@dataclass(frozen=True)
class CustomDoor:
    """Interface of a user's own model to `transformers`, with what an export needs of a `TransformerFamily`.

    Attributes:
        content: result of the user's function for `config.json`.
        names: names in `transformers` by our names.
        longest_sequence: most tokens that a sequence may have.
    """

    content: Mapping[str, Any]
    names: Mapping[str, str | TensorRename]
    longest_sequence: int

    @property
    def hf_class(self) -> str:
        """Class of `transformers` that reads the model."""
        return str(self.content["architectures"][0])

    @property
    def max_positions(self) -> int:
        """Longest sequence in tokens."""
        return self.longest_sequence

    @property
    def known_vocab_size(self) -> int:
        """Number of token ids that the model knows."""
        return int(self.content["vocab_size"])

    def hf_renames(self) -> list[TensorRename]:
        """Both names of every tensor."""
        return [
            theirs if isinstance(theirs, TensorRename) else TensorRename(ours, theirs)
            for ours, theirs in self.names.items()
        ]

    def hf_config(self, *, end_token_id: int | None, dtype: str) -> dict[str, Any]:
        """Content of `config.json`; values from the user's function take precedence."""
        ends = {"bos_token_id": end_token_id, "eos_token_id": end_token_id}
        return {**ends, "torch_dtype": dtype, **self.content}


def open_door(config: Config) -> CustomDoor:
    """Call the functions that describe a user's own model to `transformers`.

    Raises:
        ConfigError: if there are none, or they do not return names and the content of a `config.json`.
    """
    model = config.model
    assert isinstance(model, CustomModelConfig)
    assert model.hf_names is not None
    assert model.hf_config is not None
    names = call_with_config(model.hf_names, config, key="model.hf_names")
    content = call_with_config(model.hf_config, config, key="model.hf_config")
    if not isinstance(names, Mapping) or not all(isinstance(theirs, (str, TensorRename)) for theirs in names.values()):
        raise ConfigError(
            f"model.hf_names={model.hf_names}: returned {_describe(names)}, and must return a dict of the name in "
            "transformers of each logical tensor"
        )
    needed = ("architectures", "model_type", "vocab_size")
    if not isinstance(content, Mapping) or (missing := [key for key in needed if not content.get(key)]):
        what = f"a dict without {', '.join(missing)}" if isinstance(content, Mapping) else _describe(content)
        raise ConfigError(
            f"model.hf_config={model.hf_config}: returned {what}, and must return the content of config.json, with "
            'for example "architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "vocab_size": 50257'
        )
    return CustomDoor(content, names, config.train.sequence_length)


def call_with_config(path: str, config: Config, *, key: str) -> Any:
    """Import the function that the `key` of a configuration names, and call it with the configuration.

    Raises:
        ConfigError: if the function does not exist, or takes other arguments.
    """
    where = f"{key}={path}"
    function: Callable[[Config], Any] = load_object(path, key=key)
    if not callable(function):
        raise ConfigError(f"{where}: is {_describe(function)}, and must be a function that takes the configuration")
    signature: object = None
    try:
        signature = inspect.signature(function)
        signature.bind(config)
    except TypeError:
        raise ConfigError(
            f"{where}: is called with one argument, the configuration, and takes {signature}; write "
            f"def {path.rpartition(':')[2]}(config), and read model.args as config.model.args"
        ) from None
    except ValueError:  # tells no signature
        pass
    with _users_code(f"{where}: it"):
        return function(config)


@contextmanager
def _users_code(what: str) -> Iterator[None]:
    """Turn what the user's own code raises into a ConfigError; `what` is the subject of the sentence."""
    try:
        yield
    except PipekitError:
        raise
    except SystemExit:
        raise ConfigError(f"{what} ended the program, as by sys.exit; raise an error that says why") from None
    except Exception as error:
        files = [frame for frame in traceback.extract_tb(error.__traceback__) if not _is_ours(frame.filename)]
        place = f" in {files[-1].filename}:{files[-1].lineno}" if files else ""
        if isinstance(error, SyntaxError) and error.filename is not None:
            place = f" in {error.filename}:{error.lineno}"
        text = "".join(traceback.format_exception_only(type(error), error)).strip().splitlines()[-1]
        raise ConfigError(f"{what} failed{place}: {text[:_MAX_TEXT]}") from error


def _is_ours(file: str) -> bool:
    return file == __file__ or "importlib" in Path(file).parts or file.startswith("<frozen")


def load_object(path: str, *, key: str) -> Any:
    """Import the object that the `key` of a configuration names as `package.module:name`.

    The module may be in the working directory. The path of a Python file may replace the module, as in
    `/home/me/script.py:name`.

    Raises:
        ConfigError: if the module, a module that it imports, or the name in it does not exist.
    """
    module_name, _, name = path.partition(":")
    if not module_name or not name:
        raise ConfigError(f"{key}={path}: must name a module and something in it, as package.module:name")
    is_script = module_name.endswith(".py")
    # It stays there: what is imported later, inside the user's functions, is found too.
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.insert(0, here)
    if not is_script and _is_of_standard_library(module_name):
        raise ConfigError(
            f"{key}={path}: {module_name} is a module of Python's standard library, in which there is nothing of the "
            "kind; name a module of your own"
        )
    with _users_code(f"{key}={path}: importing {module_name}"):
        try:
            found: Any = (
                read_script(Path(module_name), key=f"{key}={path}")
                if is_script
                else importlib.import_module(module_name)
            )
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


def _is_of_standard_library(module_name: str) -> bool:
    """True if a name is a module of Python's own, and no file of the user's in the working directory hides it."""
    top = module_name.partition(".")[0]
    if top not in sys.stdlib_module_names:
        return False
    loaded = getattr(sys.modules.get(top), "__spec__", None) or importlib.util.find_spec(top)
    origin = loaded.origin if loaded is not None else None
    return origin in (None, "built-in", "frozen") or str(origin).startswith(sysconfig.get_path("stdlib"))


def check_specs(specs: Sequence[LayerSpec], *, where: str) -> None:
    """Check that a user's function returned a model; `where` is the subject of the error messages.

    Raises:
        ConfigError: if it is not a list or tuple of at least one layer spec.
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
