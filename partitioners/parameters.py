"""Stages of equally many parameters."""

from __future__ import annotations

from collections.abc import Sequence

from pipekit.partitioners.minmax import minmax_boundaries


def partition_by_parameters(layer_parameters: Sequence[int], num_stages: int) -> list[int]:
    """Return boundaries that make the stage with the most parameters as small as possible.

    Args:
        layer_parameters: trainable parameters of each layer; a tied layer's count wherever it occurs.
        num_stages: how many stages.

    Raises:
        LayoutError: if there are fewer layers than stages.

    Example:
        >>> partition_by_parameters([100, 10, 10, 10, 100], num_stages=3)
        [0, 1, 4, 5]
    """
    return minmax_boundaries(layer_parameters, num_stages)
