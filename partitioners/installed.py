"""Partitioners from other packages, found by the entry-point group `pipekit.partitioners`.

An entry point names a function `(inputs: PartitionInputs, num_stages: int) -> boundaries`. In the `pyproject.toml` of
its package:

    [project.entry-points."pipekit.partitioners"]
    my-partitioner = "my_package.partitioning:my_partitioner"
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib.metadata import entry_points
from typing import TYPE_CHECKING

from pipekit.errors import LayoutError
from pipekit.partitioners.manual import partition_manually

if TYPE_CHECKING:
    from pipekit.partitioners.inputs import PartitionInputs

GROUP = "pipekit.partitioners"

Partitioner = Callable[["PartitionInputs", int], Sequence[int]]


def installed_partitioners() -> list[str]:
    """Return the names of the installed partitioners, without importing them."""
    return sorted({point.name for point in entry_points(group=GROUP)})


def _load(name: str) -> Partitioner:
    """Import the partitioner that is installed under a name."""
    points = list({point.value: point for point in entry_points(group=GROUP, name=name)}.values())
    if len(points) > 1:
        places = " and ".join(point.value for point in points)
        raise LayoutError(f"parallel.partition={name} is installed more than once, as {places}; uninstall one of them")
    try:
        partitioner = points[0].load()
    except (ImportError, AttributeError) as error:
        raise LayoutError(
            f"parallel.partition={name} is installed as {points[0].value}, and that cannot be imported: {error}"
        ) from error
    if not callable(partitioner):
        raise LayoutError(
            f"parallel.partition={name} is installed as {points[0].value}, which is no function but "
            f"{partitioner!r}; name a function (inputs, num_stages) that returns the boundaries"
        )
    function: Partitioner = partitioner
    return function


def partition_by_installed(name: str, inputs: PartitionInputs, num_stages: int) -> list[int]:
    """Return the boundaries from an installed partitioner, checked like boundaries that a user gives.

    Raises:
        LayoutError: if it cannot be loaded, or its boundaries do not make `num_stages` stages of all layers.
    """
    made, source = _load(name)(inputs, num_stages), f"parallel.partition={name}: its result "
    return partition_manually(made, len(inputs.type_names), num_stages, source=source)
