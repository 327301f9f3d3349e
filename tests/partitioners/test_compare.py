"""Every way to cut a model, side by side."""

from __future__ import annotations

from dataclasses import replace

import pytest

from pipekit.errors import LayoutError
from pipekit.partitioners import MemoryLimit, PartitionInputs, compare_partitions, imbalance_of

INPUTS = PartitionInputs(["Layer"] * 6, lambda: [50, 10, 10, 10, 10, 50])


def test_methods_without_facts_are_left_out() -> None:
    assert [found.method for found in compare_partitions(INPUTS, 2)] == ["parameters", "uniform"]


def test_all_are_measured_by_the_best_costs() -> None:
    inputs = replace(INPUTS, count_flops=lambda: [0, 12, 12, 12, 12, 60], measure_seconds=lambda: [0, 3, 3, 3, 3, 4])
    found = {method: (boundaries, imbalance) for method, boundaries, imbalance in compare_partitions(inputs, 2)}
    assert found == {
        "profile": ([0, 4, 6], 9 / 8),
        "parameters": ([0, 3, 6], 10 / 8),
        "uniform": ([0, 3, 6], 10 / 8),
        "flops": ([0, 5, 6], 12 / 8),
    }
    assert next(iter(found)) == "profile"


def test_ranks_are_measured_and_extras_count() -> None:
    inputs = PartitionInputs(["Layer"] * 8, lambda: [1] * 7 + [5], placement=(0, 1, 1, 0))
    assert compare_partitions(inputs, 4)[0].imbalance == 1
    extras = replace(inputs, stage_extras=lambda method: [0, 0, 0, 12])
    assert imbalance_of([0, 1, 5, 7, 8], extras) == 18 / 12


def test_memory_is_there_where_something_fits() -> None:
    limit = MemoryLimit([10] * 6, [0] * 6, [2, 1], [0, 0], 30)
    inputs = replace(INPUTS, count_flops=lambda: [0, 12, 12, 12, 12, 60], memory_limit=lambda: limit)
    assert ("memory", [0, 3, 6]) in [(method, boundaries) for method, boundaries, _ in compare_partitions(inputs, 2)]
    small = replace(inputs, memory_limit=lambda: replace(limit, limit_bytes=20))
    assert "memory" not in [found.method for found in compare_partitions(small, 2)]


def test_seconds_are_measured_once() -> None:
    times = []

    def measure() -> list[float]:
        times.append(1)
        return [1.0] * 6

    compare_partitions(replace(INPUTS, measure_seconds=measure), 2)
    assert len(times) == 1


def test_layers_without_cost_are_no_division_by_zero() -> None:
    assert imbalance_of([0, 1, 2], PartitionInputs(["Layer"] * 2, lambda: [0, 0])) == 1


def test_fewer_layers_than_stages_is_refused() -> None:
    with pytest.raises(LayoutError, match=r"try parallel\.pp=6 or lower"):
        compare_partitions(INPUTS, 7)
