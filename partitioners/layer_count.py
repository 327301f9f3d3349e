"""Partitions into stages with equal numbers of layers, of any type or of one type."""

from __future__ import annotations

import re
from collections.abc import Sequence

from pipekit.errors import LayoutError
from pipekit.partitioners.minmax import minmax_boundaries


def partition_uniform(num_layers: int, num_stages: int) -> list[int]:
    """Return boundaries of stages whose numbers of layers differ by at most one.

    Raises:
        LayoutError: if there are fewer layers than stages.

    Example:
        >>> partition_uniform(6, num_stages=3)
        [0, 2, 4, 6]
    """
    return minmax_boundaries([1] * num_layers, num_stages)


def partition_by_type(type_names: Sequence[str], pattern: str, num_stages: int) -> list[int]:
    """Return boundaries that spread the layers whose class name matches a pattern evenly over the stages.

    Other layers stay with the matching layer before them, as long as no stage is empty.

    Args:
        type_names: class name of each layer.
        pattern: regular expression, searched for anywhere in the name, ignoring case.
        num_stages: number of stages.

    Raises:
        LayoutError: if no layer matches, the pattern is not a regular expression, or there are fewer layers than
            stages.

    Example:
        >>> partition_by_type(["Embed", "Block", "Block", "Head"], "block", num_stages=2)
        [0, 2, 4]
    """
    try:
        expression = re.compile(pattern, re.IGNORECASE)
    except re.error as error:
        raise LayoutError(f"parallel.partition=type:{pattern} is no regular expression: {error}") from None
    matches = [int(expression.search(name) is not None) for name in type_names]
    if not any(matches):
        names = ", ".join(dict.fromkeys(type_names))
        raise LayoutError(f"parallel.partition=type:{pattern} matches no layer; the layers' types are {names}")
    return minmax_boundaries(matches, num_stages)
