"""Partitioners by name, as a configuration asks for them."""

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
    """Return the stage boundaries of a model.

    `parameters`, `uniform`, `flops` and `profile` balance what the ranks have of parameters, layers, counted operations
    and measured seconds; `memory` does so by the seconds, or by the operations where nothing was measured, among the
    partitions that fit into the memory. `type:<regex>` gives each stage as many layers of a type. `manual` takes
    `boundaries`. Any other name is looked for among the installed partitioners.

    Args:
        method: the name.
        inputs: the layers and their costs.
        num_stages: how many stages.
        boundaries: for `manual`: layer indices, or a stage spec such as `Et*3|t*3L`.

    Returns:
        `num_stages + 1` layer indices; stage `s` holds layers `boundaries[s]` to `boundaries[s + 1] - 1`.

    Raises:
        LayoutError: if the method is unknown, the layers cannot be cut so, or inputs that it needs are missing.

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
    """Return in words what `parallel.partition` may be, with the partitioners that are installed."""
    installed = installed_partitioners()
    own = f"one that is installed ({', '.join(installed)})" if installed else "one that you install (there are none)"
    return f"{', '.join(BALANCED_METHODS)}, memory, type:<regex>, manual or {own}"
