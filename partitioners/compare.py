"""Comparison of all partition methods for a model."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import NamedTuple

from pipekit.errors import LayoutError
from pipekit.partitioners.inputs import PartitionInputs
from pipekit.partitioners.local_search import StageSums
from pipekit.partitioners.methods import partition
from pipekit.partitioners.minmax import as_integers
from pipekit.partitioners.prefix_sums import PrefixSums


class ComparedPartition(NamedTuple):
    """Partition of a model by one method.

    Attributes:
        method: the method.
        boundaries: boundaries of the stages.
        imbalance: the largest cost of a rank divided by the mean; 1 if all costs are equal.
    """

    method: str
    boundaries: list[int]
    imbalance: float


def compare_partitions(inputs: PartitionInputs, num_stages: int) -> list[ComparedPartition]:
    """Partitions by every method for which there are inputs, the most balanced first.

    All are rated by the best costs known: the layers' seconds, or their operations, or their parameters. `memory` is
    left out if no partition fits.

    Raises:
        LayoutError: if there are fewer layers than stages.

    Example:
        >>> inputs = PartitionInputs(["Embed", "Block", "Block"], lambda: [8, 4, 4], lambda: [0, 6, 6])
        >>> for found in compare_partitions(inputs, 2):
        ...     (found.method, found.boundaries, found.imbalance)
        ('flops', [0, 2, 3], 1.0)
        ('uniform', [0, 2, 3], 1.0)
        ('parameters', [0, 1, 3], 2.0)
    """
    # Each is computed once at most: seconds take long to measure.
    inputs = replace(
        inputs,
        count_parameters=cache(inputs.count_parameters),
        count_flops=inputs.count_flops and cache(inputs.count_flops),
        measure_seconds=inputs.measure_seconds and cache(inputs.measure_seconds),
        memory_limit=inputs.memory_limit and cache(inputs.memory_limit),
    )
    methods = ["profile"] * (inputs.measure_seconds is not None) + ["flops"] * (inputs.count_flops is not None)
    found = []
    if inputs.memory_limit is not None and methods:
        methods.append("memory")
    for method in (*methods, "parameters", "uniform"):
        try:
            boundaries = partition(method, inputs, num_stages)
        except LayoutError:
            if method != "memory":
                raise
            continue
        found.append(ComparedPartition(method, boundaries, imbalance_of(boundaries, inputs)))
    return sorted(found, key=lambda compared: compared.imbalance)


def imbalance_of(boundaries: list[int], inputs: PartitionInputs) -> float:
    """Return the largest cost of a rank divided by the mean, by the best costs known; 1 if all costs are equal.

    Example:
        >>> imbalance_of([0, 1, 4], PartitionInputs(["Layer"] * 4, lambda: [1, 1, 1, 1]))
        1.5
    """
    num_stages = len(boundaries) - 1
    method = inputs.best_costs
    costs, extras = as_integers(inputs.costs(method), inputs.extras(method) or [0] * num_stages)
    ranks = StageSums([PrefixSums.of(costs).before] * num_stages, extras).ranks(boundaries, inputs.ranks_of(num_stages))
    return max(ranks) * len(ranks) / sum(ranks)
