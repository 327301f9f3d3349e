"""Partitioners: pure functions from the layers of a model to the boundaries of its stages."""

from __future__ import annotations

from pipekit.partitioners.balanced import balanced_boundaries
from pipekit.partitioners.compare import ComparedPartition, compare_partitions, imbalance_of
from pipekit.partitioners.inputs import PartitionInputs
from pipekit.partitioners.installed import installed_partitioners
from pipekit.partitioners.layer_count import partition_by_type, partition_uniform
from pipekit.partitioners.manual import partition_manually
from pipekit.partitioners.memory_limit import MemoryLimit
from pipekit.partitioners.methods import known_methods, partition
from pipekit.partitioners.minmax import minmax_boundaries, stage_costs
from pipekit.partitioners.stage_spec import stage_spec_boundaries

__all__ = [
    "ComparedPartition",
    "MemoryLimit",
    "PartitionInputs",
    "balanced_boundaries",
    "compare_partitions",
    "imbalance_of",
    "installed_partitioners",
    "known_methods",
    "minmax_boundaries",
    "partition",
    "partition_by_type",
    "partition_manually",
    "partition_uniform",
    "stage_costs",
    "stage_spec_boundaries",
]
