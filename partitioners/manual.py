"""Stages as the user draws them."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from pipekit.errors import LayoutError


def partition_manually(boundaries: Sequence[int], num_layers: int, num_stages: int) -> list[int]:
    """Return the user's boundaries, checked.

    Raises:
        LayoutError: if they do not start with 0, grow, end with `num_layers`, and make `num_stages` stages.

    Example:
        >>> partition_manually([0, 1, 4], num_layers=4, num_stages=2)
        [0, 1, 4]
    """
    given = [int(boundary) for boundary in boundaries]
    fault = None
    if len(given) != num_stages + 1:
        fault = f"has {len(given)} entries, and parallel.pp={num_stages} needs {num_stages + 1}"
    elif given[0] != 0 or given[-1] != num_layers:
        fault = f"must start with 0 and end with {num_layers}, the number of layers"
    elif any(end <= start for start, end in pairwise(given)):
        fault = "must grow from entry to entry, since a stage must not be empty"
    if fault:
        if num_stages > num_layers:
            instead = f"try parallel.pp={num_layers} or lower"
        else:
            instead = f"try {[stage * num_layers // num_stages for stage in range(num_stages + 1)]}"
        raise LayoutError(f"parallel.boundaries={given} {fault}; {instead}")
    return given
