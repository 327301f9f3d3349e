"""Fingerprint of a layer: plain data that are the same in every process, the key of its measurements.

The source files of its classes count by content, so that an edited class is another layer.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import hashlib
import inspect
import types
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pipekit.layers.specs import LayerSpec, TiedLayerSpec

Plain = Any
"""Numbers, texts, None, and lists and dicts of them."""


class UnstableError(Exception):
    """Something has no description that another process would give too."""


class Fingerprinter:
    """Describes layers, and reads each source file once."""

    def __init__(self) -> None:
        self._digests: dict[str, str] = {}

    def of_layer(self, spec: LayerSpec, modules: Iterable[nn.Module]) -> Plain:
        """Fingerprint of a layer.

        Args:
            spec: its spec.
            modules: the built layer and all modules in it, whose classes count too.

        Raises:
            UnstableError: if an argument is an object without a stable description.
        """
        forward_fn = spec.forward_fn if isinstance(spec, TiedLayerSpec) else None
        kinds = {type(module): None for module in modules}
        return {
            "class": self.of(spec.typename),
            "arguments": [self.of(value) for value in spec.module_args],
            "keywords": self.of(spec.module_kwargs),
            "forward": self.of(forward_fn),
            "modules": sorted((self.of(kind) for kind in kinds), key=repr),
        }

    def of(self, value: Any) -> Plain:
        """Fingerprint of a value.

        Raises:
            UnstableError: if it is an object without a stable description.

        Example:
            >>> Fingerprinter().of({"width": 8, "types": (torch.bfloat16, None)})
            ['dict', ['width', 8], ['types', ['tuple', ['dtype', 'torch.bfloat16'], None]]]
        """
        if value is None or isinstance(value, (bool, int, float, str)):
            return [type(value).__name__, value.name] if isinstance(value, enum.Enum) else value
        if isinstance(value, (list, tuple)):
            return [type(value).__name__, *map(self.of, value)]
        if isinstance(value, dict):
            return ["dict", *([self.of(key), self.of(part)] for key, part in value.items())]
        if isinstance(value, (torch.dtype, torch.device)):
            return [type(value).__name__, str(value)]
        if isinstance(value, Tensor):
            return ["tensor", list(value.shape), str(value.dtype)]
        if isinstance(value, type):
            return ["class", *(self._defined(base) for base in value.__mro__ if base.__module__ != "builtins")]
        if isinstance(value, functools.partial):
            return ["partial", self.of(value.func), self.of(value.args), self.of(value.keywords)]
        if isinstance(value, types.MethodType):
            return ["method", self.of(value.__func__), self.of(value.__self__)]
        if isinstance(value, types.FunctionType):
            return self._function(value)
        if isinstance(value, (types.BuiltinFunctionType, types.BuiltinMethodType)):
            return ["function", str(value.__module__), value.__qualname__]
        return self._object(value)

    def _object(self, value: Any) -> Plain:
        if dataclasses.is_dataclass(value):
            fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
            return ["object", self.of(type(value)), self.of(fields)]
        text = repr(value)
        if " at 0x" in text:
            raise UnstableError(text)
        return ["object", self.of(type(value)), text]

    def _function(self, function: types.FunctionType) -> Plain:
        closure = [cell.cell_contents for cell in function.__closure__ or ()]
        # Functions of one name differ by their place in the file, and those of one place by what they remember.
        place = next(iter(function.__code__.co_positions())) if hasattr(function.__code__, "co_positions") else ()
        return [
            "function",
            self._defined(function),
            function.__code__.co_firstlineno,
            list(place),
            self.of(closure),
            self.of(function.__defaults__),
            self.of(function.__kwdefaults__),
        ]

    def _defined(self, item: type | types.FunctionType) -> Plain:
        name = f"{item.__module__}.{item.__qualname__}"
        if item.__module__.partition(".")[0] == "torch":  # of which the version counts
            return [name]
        try:
            file = inspect.getsourcefile(item)
            if file is None:
                raise UnstableError(name)
            if file not in self._digests:
                self._digests[file] = hashlib.blake2b(Path(file).read_bytes(), digest_size=16).hexdigest()
        except (TypeError, OSError):
            raise UnstableError(name) from None
        return [name, self._digests[file]]
