"""Partitioners by the names that a configuration uses."""

from __future__ import annotations

from collections.abc import Sequence

from pipekit.errors import LayoutError
from pipekit.partitioners.balanced import balanced_boundaries
from pipekit.partitioners.inputs import PartitionInputs
from pipekit.partitioners.installed import installed_partitioners, partition_by_installed
from pipekit.partitioners.layer_count import partition_by_type
from pipekit.partitioners.manual import partition_manually
from pipekit.partitioners.stage_spec import stage_spec_boundaries

BALANCED_METHODS = ("parameters", "uniform", "flops", "profile")
"""The methods that balance one cost of the layers."""


def partition(
    method: str, inputs: PartitionInputs, num_stages: int, *, boundaries: Sequence[int] | str | None = None
) -> list[int]:
    """Partition a model into stages by a named method, and return the stage boundaries.

    `parameters`, `uniform`, `flops` and `profile` balance the ranks' numbers of parameters, of layers, of operations,
    or their measured seconds. `memory` balances the seconds, or the operations if nothing was measured, among the
    partitions that fit into the memory. `type:<regex>` gives all stages the same number of layers of a type. `manual`
    takes `boundaries`. Any other name must be an installed partitioner.

    Args:
        method: name of the method.
        inputs: the layers and their costs.
        num_stages: number of stages.
        boundaries: for `manual`: layer indices, or a stage spec such as `Et*3|t*3L`.

    Returns:
        `num_stages + 1` layer indices; stage `s` holds layers `boundaries[s]` to `boundaries[s + 1] - 1`.

    Raises:
        LayoutError: if the method is unknown, cannot partition the layers, or needs inputs that are missing.

    Example:
        >>> inputs = PartitionInputs(["Embed", "Block", "Block", "Head"], lambda: [5, 3, 3, 5], placement=(0, 1, 1, 0))
        >>> partition("parameters", inputs, 4)
        [0, 1, 2, 3, 4]
    """
    num_layers = len(inputs.type_names)
    if method == "manual":
        if isinstance(boundaries, str):
            if inputs.layer_names is None:
                raise LayoutError(
                    f"parallel.boundaries={boundaries} speaks of blocks, and the layers' names are not known here; "
                    "give a list of layer indices"
                )
            return stage_spec_boundaries(boundaries, inputs.layer_names, num_stages)
        return partition_manually(boundaries or (), num_layers, num_stages)
    memory_limit = None
    if method == "memory":
        if inputs.memory_limit is None:
            raise LayoutError(
                "parallel.partition=memory needs to know what the layers hold and what a rank may, and neither is "
                "known here; try parallel.partition=parameters"
            )
        method, memory_limit = "flops" if inputs.measure_seconds is None else "profile", inputs.memory_limit
    if method in BALANCED_METHODS:
        return balanced_boundaries(
            inputs.costs(method),
            inputs.ranks_of(num_stages),
            stage_extras=inputs.extras(method),
            memory=memory_limit and memory_limit(),
        )
    if method.startswith("type:"):
        return partition_by_type(inputs.type_names, method.removeprefix("type:"), num_stages)
    if method in installed_partitioners():
        return partition_by_installed(method, inputs, num_stages)
    raise LayoutError(f"parallel.partition={method}: no such partitioner; use {known_methods()}")


def known_methods() -> str:
    """Return the values of `parallel.partition` in words, including installed partitioners."""
    installed = installed_partitioners()
    own = f"one that is installed ({', '.join(installed)})" if installed else "one that you install (there are none)"
    return f"{', '.join(BALANCED_METHODS)}, memory, type:<regex>, manual or {own}"
