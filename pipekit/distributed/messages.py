"""Messages between processes: values, arrays and records of pipekit as JSON, which runs no code when it is read.

A message holds None, truth values, numbers, text, bytes, paths, lists, tuples, sets, dicts, numpy arrays,
tensors, enum members and dataclasses of pipekit's. Nothing else is sent, and nothing else is made of what is received.
"""

from __future__ import annotations

import base64
import dataclasses
import json
import sys
from collections.abc import Callable
from enum import Enum
from pathlib import Path, PurePath
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipekit.errors import PipekitError

_TAG = "\0"


def encode_message(value: Any) -> bytes:
    """Return a value as a message.

    Raises:
        TypeError: if a part of it is of a type that is not sent.

    Example:
        >>> decode_message(encode_message({1: (2.5, float("inf"))}))
        {1: (2.5, inf)}
    """
    return json.dumps(_pack(value), separators=(",", ":")).encode()


def decode_message(message: bytes) -> Any:
    """Return the value of a message.

    Raises:
        ValueError: if it is no message.
    """
    return _unpack(json.loads(message))


def _pack(value: Any) -> Any:
    kind = type(value)
    if value is None or kind in (bool, int, float, str):
        return value
    if kind is list:
        return ["", *map(_pack, value)]
    if kind in (tuple, set, frozenset):
        return [_TAG, kind.__name__, *map(_pack, value)]
    if isinstance(value, PurePath):
        return [_TAG, "path", str(value)]
    if kind is bytes:
        return [_TAG, "bytes", _text(value)]
    if isinstance(value, Enum):
        return [_TAG, "enum", _name(kind), _pack(value.value)]
    if isinstance(value, dict):
        return [_TAG, "dict", *([_pack(key), _pack(item)] for key, item in value.items())]
    if isinstance(value, tuple):  # a named one, or a shape
        return [_TAG, "tuple", *map(_pack, value)]
    if isinstance(value, (np.ndarray, np.generic)) and not value.dtype.hasobject:
        array = np.asarray(value)
        return [
            _TAG,
            "array",
            array.dtype.str,
            list(array.shape),
            isinstance(value, np.ndarray),
            _text(array.tobytes()),
        ]
    if isinstance(value, Tensor) and value.layout == torch.strided:
        data = value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
        return [_TAG, "tensor", str(value.dtype).removeprefix("torch."), list(value.shape), _text(data)]
    if dataclasses.is_dataclass(value) and _is_ours(kind):
        fields = [field.name for field in dataclasses.fields(value) if field.init]
        return [_TAG, "record", _name(kind), *([name, _pack(getattr(value, name))] for name in fields)]
    if isinstance(value, type) and issubclass(value, PipekitError) and _is_ours(value):
        return [_TAG, "class", _name(value)]
    raise TypeError(
        f"a {kind.__module__}.{kind.__qualname__} is not sent between processes; send numbers, text, lists, dicts, "
        "arrays or tensors"
    )


def _unpack(packed: Any) -> Any:
    if not isinstance(packed, list):
        return packed
    tag, *items = packed
    if tag == "":
        return [_unpack(item) for item in items]
    kind, *parts = items
    if tag != _TAG or kind not in _READERS:
        raise ValueError(f"no message: {tag!r} {kind!r}")
    return _READERS[kind](*parts)


def _read_array(dtype: str, shape: list[int], is_array: bool, data: str) -> Any:
    array = np.frombuffer(base64.b64decode(data), dtype=np.dtype(dtype)).reshape(shape).copy()
    return array if is_array else array[()]


def _read_tensor(dtype: str, shape: list[int], data: str) -> Tensor:
    kind = getattr(torch, dtype)
    if not isinstance(kind, torch.dtype):
        raise ValueError(f"no dtype: {dtype!r}")
    raw = bytearray(base64.b64decode(data))
    flat = torch.frombuffer(raw, dtype=torch.uint8).view(kind) if raw else torch.empty(0, dtype=kind)
    return flat.reshape(shape)


def _read_record(name: str, *fields: tuple[str, Any]) -> Any:
    cls = _find(name)
    if not dataclasses.is_dataclass(cls):
        raise ValueError(f"no record: {name}")
    return cls(**{field: _unpack(value) for field, value in fields})


def _read_enum(name: str, value: Any) -> Any:
    cls = _find(name)
    if not issubclass(cls, Enum):
        raise ValueError(f"no enum: {name}")
    return cls(_unpack(value))


def _read_class(name: str) -> type[PipekitError]:
    cls = _find(name)
    if not issubclass(cls, PipekitError):
        raise ValueError(f"no error: {name}")
    return cls


_READERS: dict[str, Callable[..., Any]] = {
    "tuple": lambda *items: tuple(map(_unpack, items)),
    "set": lambda *items: set(map(_unpack, items)),
    "frozenset": lambda *items: frozenset(map(_unpack, items)),
    "dict": lambda *items: {_unpack(key): _unpack(item) for key, item in items},
    "path": Path,
    "bytes": base64.b64decode,
    "array": _read_array,
    "tensor": _read_tensor,
    "record": _read_record,
    "enum": _read_enum,
    "class": _read_class,
}


def _is_ours(cls: type) -> bool:
    return cls.__module__.partition(".")[0] == __name__.partition(".")[0] and "<" not in cls.__qualname__


def _name(cls: type) -> str:
    if not _is_ours(cls):
        raise TypeError(
            f"a {cls.__module__}.{cls.__qualname__} is not sent between processes, since it is not pipekit's"
        )
    return f"{cls.__module__}:{cls.__qualname__}"


def _find(name: str) -> type:
    """The class of pipekit's with a name, of a module that is imported already."""
    module, _, path = name.partition(":")
    found: Any = sys.modules.get(module) if module.partition(".")[0] == __name__.partition(".")[0] else None
    for part in path.split("."):
        found = getattr(found, part, None)
    # A name that a module has imported leads to another's class.
    if not isinstance(found, type) or not _is_ours(found):
        raise ValueError(f"no class of pipekit's: {name}")
    return found


def _text(data: bytes) -> str:
    return base64.b64encode(data).decode()
