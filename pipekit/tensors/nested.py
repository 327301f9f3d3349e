"""Nested tuples, lists and dicts of tensors, as a flat list and a structure that can be written as JSON."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import Tensor

from pipekit.errors import PipekitError

Structure = Any
"""`"*"` for a tensor, None for None, `["tuple", ...]`, `["list", ...]`, or a dict of structures."""


def flatten(value: Any, what: str) -> tuple[tuple[Tensor, ...], Structure]:
    """Return the tensors of `value` in order, and the structure that they are in.

    Raises:
        PipekitError: if `value`, which it calls `what`, holds anything but tensors, None, tuples, lists and dicts.

    Example:
        >>> import torch
        >>> tensors, structure = flatten({"x": torch.ones(2), "mask": None, "pair": (torch.ones(1),)}, "an output")
        >>> len(tensors), structure
        (2, {'x': '*', 'mask': None, 'pair': ['tuple', '*']})
    """
    tensors: list[Tensor] = []
    structure = _flatten(value, tensors, what)
    return tuple(tensors), structure


def _flatten(value: Any, tensors: list[Tensor], what: str) -> Structure:
    if isinstance(value, Tensor):
        tensors.append(value)
        return "*"
    if value is None:
        return None
    if isinstance(value, (tuple, list)):
        kind = "tuple" if isinstance(value, tuple) else "list"
        return [kind, *(_flatten(item, tensors, what) for item in value)]
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return {key: _flatten(item, tensors, what) for key, item in value.items()}
    raise PipekitError(
        f"{what} holds a {type(value).__name__}; what passes between layers must be tensors, None, or tuples, lists "
        "and dicts (with text keys) of them: make a number a tensor, or keep it in the layer"
    )


def map_tensors(function: Callable[[Tensor], Any], value: Any) -> Any:
    """Apply a function to each tensor in nested tuples, lists and dicts; what else is in them stays.

    Example:
        >>> import torch
        >>> map_tensors(torch.Tensor.tolist, {"ids": torch.arange(2), "names": ["a"]})
        {'ids': [0, 1], 'names': ['a']}
    """
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, (tuple, list)):
        parts = [map_tensors(function, part) for part in value]
        return parts if isinstance(value, list) else tuple(parts)
    if isinstance(value, dict):
        return {key: map_tensors(function, part) for key, part in value.items()}
    return value


def unflatten(tensors: Sequence[Tensor], structure: Structure) -> Any:
    """Rebuild the value from the tensors and the structure of `flatten`.

    Example:
        >>> import torch
        >>> unflatten([torch.tensor(1), torch.tensor(2)], ["tuple", "*", None, ["list", "*"]])
        (tensor(1), None, [tensor(2)])
    """
    return _unflatten(iter(tensors), structure)


def _unflatten(tensors: Iterator[Tensor], structure: Structure) -> Any:
    if structure == "*":
        return next(tensors)
    if structure is None:
        return None
    if isinstance(structure, dict):
        return {key: _unflatten(tensors, item) for key, item in structure.items()}
    kind, *items = structure
    values = (_unflatten(tensors, item) for item in items)
    return tuple(values) if kind == "tuple" else list(values)
