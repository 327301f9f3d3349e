"""Tensors without values: shapes by name, numbers of elements, and bytes of each in a number format."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Literal

Shape = tuple[int, ...]

Precision = Literal["fp32", "bf16", "fp16"]
"""Number format of weights and activations."""

BYTES_PER_ELEMENT: dict[Precision, int] = {"fp32": 4, "bf16": 2, "fp16": 2}
"""Bytes of one weight or activation."""


def count_elements(*layers: Mapping[str, Shape]) -> int:
    """Number of elements in the parameters of some layers; parameters of one name count once.

    Example:
        >>> count_elements({"embed.weight": (5, 4)}, {"norm.weight": (4,)}, {"embed.weight": (5, 4)})
        24
    """
    shapes = {name: shape for layer in layers for name, shape in layer.items()}
    return sum(map(prod, shapes.values()))
