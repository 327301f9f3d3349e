"""Partitioners: pure functions from the layers of a model to the boundaries of its stages."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pipekit.errors import LayoutError
from pipekit.partitioners.layer_type import partition_by_type
from pipekit.partitioners.manual import partition_manually
from pipekit.partitioners.minmax import minmax_boundaries, stage_costs
from pipekit.partitioners.parameters import partition_by_parameters
from pipekit.partitioners.uniform import partition_uniform

__all__ = [
    "LayerFacts",
    "minmax_boundaries",
    "partition",
    "partition_by_parameters",
    "partition_by_type",
    "partition_manually",
    "partition_uniform",
    "stage_costs",
]


@dataclass(frozen=True)
class LayerFacts:
    """What a partitioner may know of a model.

    Attributes:
        type_names: class name of each layer.
        count_parameters: returns the trainable parameters of each layer; called only by a strategy that asks.
    """

    type_names: Sequence[str]
    count_parameters: Callable[[], Sequence[int]]


def partition(method: str, facts: LayerFacts, num_stages: int, *, boundaries: Sequence[int] | None = None) -> list[int]:
    """Return the stage boundaries of a model.

    Args:
        method: `parameters`, `uniform`, `type:<regex>` or `manual`.
        facts: the layers.
        num_stages: how many stages.
        boundaries: for `manual`.

    Returns:
        `num_stages + 1` layer indices; stage `s` holds layers `boundaries[s]` to `boundaries[s + 1] - 1`.

    Raises:
        LayoutError: if the method is unknown or the layers cannot be cut so.
    """
    num_layers = len(facts.type_names)
    if method == "manual":
        return partition_manually(boundaries or (), num_layers, num_stages)
    if method == "uniform":
        return partition_uniform(num_layers, num_stages)
    if method == "parameters":
        return partition_by_parameters(facts.count_parameters(), num_stages)
    if method.startswith("type:"):
        return partition_by_type(facts.type_names, method.removeprefix("type:"), num_stages)
    raise LayoutError(
        f"parallel.partition={method}: no such partitioner; use parameters, uniform, type:<regex> or manual"
    )
