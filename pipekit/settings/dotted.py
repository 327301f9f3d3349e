"""Dotted keys of nested settings, such as `train.steps`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any


def dotted_items(section: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys and values of nested settings.

    Example:
        >>> list(dotted_items({"train": {"steps": 3, "ema": None}, "seed": 1}))
        [('train.steps', 3), ('train.ema', None), ('seed', 1)]
    """
    for key, value in section.items():
        if isinstance(value, Mapping):
            yield from dotted_items(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
