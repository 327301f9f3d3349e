"""Stages of equally many layers."""

from __future__ import annotations

from pipekit.partitioners.minmax import minmax_boundaries


def partition_uniform(num_layers: int, num_stages: int) -> list[int]:
    """Return boundaries of stages that differ by one layer at most.

    Raises:
        LayoutError: if there are fewer layers than stages.

    Example:
        >>> partition_uniform(6, num_stages=3)
        [0, 2, 4, 6]
    """
    return minmax_boundaries([1] * num_layers, num_stages)
