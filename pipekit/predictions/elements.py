"""Parameters as shapes by name, and how many numbers they are."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod

Shape = tuple[int, ...]


def count_elements(*layers: Mapping[str, Shape]) -> int:
    """Return how many numbers the parameters of some layers have, those of one name once.

    Example:
        >>> count_elements({"embed.weight": (5, 4)}, {"norm.weight": (4,)}, {"embed.weight": (5, 4)})
        24
    """
    shapes = {name: shape for layer in layers for name, shape in layer.items()}
    return sum(map(prod, shapes.values()))
