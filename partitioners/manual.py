"""Manual partitions: the user's own boundaries."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from operator import index

from pipekit.errors import LayoutError


def partition_manually(
    boundaries: Sequence[int], num_layers: int, num_stages: int, *, source: str = "parallel.boundaries="
) -> list[int]:
    """Return the user's boundaries, checked.

    Args:
        boundaries: layer indices, one more than stages.
        num_layers: number of layers of the model.
        num_stages: required number of stages.
        source: origin of the boundaries, with which error messages begin.

    Raises:
        LayoutError: if the boundaries do not rise from 0 to `num_layers`, or do not make `num_stages` stages.

    Example:
        >>> partition_manually([0, 1, 4], num_layers=4, num_stages=2)
        [0, 1, 4]
    """
    try:
        given = [index(boundary) for boundary in boundaries]
    except TypeError:
        raise LayoutError(
            f"{source}{boundaries!r} must be a list of whole numbers{_instead(num_layers, num_stages)}"
        ) from None
    fault = None
    if len(given) != num_stages + 1:
        fault = f"has {len(given)} entries, and parallel.pp={num_stages} needs {num_stages + 1}"
    elif given[0] != 0 or given[-1] != num_layers:
        fault = f"must start with 0 and end with {num_layers}, the number of layers"
    elif any(end <= start for start, end in pairwise(given)):
        fault = "must grow from entry to entry, since a stage must not be empty"
    if fault:
        raise LayoutError(f"{source}{given} {fault}{_instead(num_layers, num_stages)}")
    return given


def _instead(num_layers: int, num_stages: int) -> str:
    if num_stages > num_layers:
        return f"; try parallel.pp={num_layers} or lower"
    return f"; try {[stage * num_layers // num_stages for stage in range(num_stages + 1)]}"
