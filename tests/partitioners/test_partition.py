"""Choosing a partitioner by its name."""

from __future__ import annotations

from dataclasses import replace

import pytest

from pipekit.errors import LayoutError
from pipekit.partitioners import MemoryLimit, PartitionInputs, partition, stage_costs

TYPES = ["Embed", "Block", "Block", "Block", "Head"]
PARAMETERS = [100, 10, 10, 10, 100]


def counted() -> PartitionInputs:
    return PartitionInputs(TYPES, lambda: PARAMETERS)


def uncounted() -> PartitionInputs:
    def count() -> list[int]:
        raise AssertionError("this strategy does not ask for parameters")

    return PartitionInputs(TYPES, count)


def test_each_name_reaches_its_strategy() -> None:
    assert partition("parameters", counted(), 3) == [0, 1, 4, 5]
    assert partition("uniform", uncounted(), 3) == [0, 2, 4, 5]
    assert partition("type:block", uncounted(), 3) == [0, 2, 3, 5]
    assert partition("manual", uncounted(), 3, boundaries=(0, 3, 4, 5)) == [0, 3, 4, 5]


def test_counted_operations_and_measured_seconds_are_balanced() -> None:
    inputs = replace(counted(), count_flops=lambda: [0, 2, 2, 2, 6], measure_seconds=lambda: [0.1, 0.1, 0.1, 0.1, 0.9])
    assert partition("flops", inputs, 2) == [0, 4, 5]
    assert partition("profile", inputs, 3) == [0, 2, 4, 5]


@pytest.mark.parametrize(("method", "inputs"), [("flops", "counted operations"), ("profile", "measured seconds")])
def test_costs_that_nobody_knows_are_asked_for(method: str, inputs: str) -> None:
    with pytest.raises(LayoutError, match=f"parallel.partition={method} needs the layers' {inputs}, and"):
        partition(method, counted(), 2)


@pytest.mark.parametrize("method", ["uniform", "parameters", "flops", "profile"])
def test_with_several_stages_a_rank_it_is_ranks_that_are_balanced(method: str) -> None:
    costs = [1, 1, 1, 1, 1, 1, 1, 5] if method != "uniform" else [1] * 8
    inputs = PartitionInputs(["Layer"] * 8, lambda: costs, lambda: costs, lambda: costs, placement=(0, 1, 1, 0))
    boundaries = partition(method, inputs, 4)
    stages = stage_costs(costs, boundaries)
    assert stages[0] + stages[3] == stages[1] + stages[2] == sum(costs) / 2


def test_extras_of_stages_are_in_the_unit_of_the_method() -> None:
    asked = []

    def extras(method: str) -> list[int] | None:
        asked.append(method)
        return [0, 2] if method == "flops" else None

    inputs = PartitionInputs(["Layer"] * 8, lambda: [1] * 8, lambda: [1] * 8, stage_extras=extras)
    assert partition("flops", inputs, 2) == [0, 5, 8]
    assert partition("parameters", inputs, 2) == [0, 4, 8]
    assert asked == ["flops", "parameters"]


def test_memory_takes_seconds_where_they_were_measured() -> None:
    limit = MemoryLimit([10] * 8, [5] * 8, in_flight=[4, 1], extra_bytes=[0, 20], limit_bytes=100)
    inputs = PartitionInputs(["Layer"] * 8, lambda: [1] * 8, lambda: [1] * 8, memory_limit=lambda: limit)
    assert partition("flops", inputs, 2) == [0, 4, 8]
    assert partition("memory", inputs, 2) == [0, 3, 8]
    measured = replace(inputs, measure_seconds=lambda: [9.0, 1, 1, 1, 1, 1, 1, 1])
    assert partition("memory", measured, 2) == [0, 3, 8]
    roomy = replace(measured, memory_limit=lambda: replace(limit, limit_bytes=1000))
    assert partition("memory", roomy, 2) == [0, 1, 8]


def test_memory_needs_a_limit_and_costs() -> None:
    with pytest.raises(LayoutError, match=r"parallel\.partition=memory needs to know what the layers hold"):
        partition("memory", counted(), 2)
    limit = MemoryLimit([1] * 5, [1] * 5, [2, 1], [0, 0], 100)
    with pytest.raises(LayoutError, match="needs the layers' counted operations"):
        partition("memory", replace(counted(), memory_limit=lambda: limit), 2)


def test_a_placement_of_other_stages_is_refused() -> None:
    with pytest.raises(LayoutError, match=r"the placement \(0, 1, 1, 0\) is for 4 stages, not 2"):
        partition("uniform", replace(counted(), placement=(0, 1, 1, 0)), 2)


def test_manual_takes_letters_where_the_layers_have_names() -> None:
    named = replace(uncounted(), layer_names=["embed", "b.0", "b.1", "b.2", "head"])
    assert partition("manual", named, 3, boundaries="Et|t|tL") == [0, 2, 3, 5]
    with pytest.raises(
        LayoutError, match=r"parallel\.boundaries=Et\|ttL speaks of blocks, and the layers' names are not"
    ):
        partition("manual", uncounted(), 2, boundaries="Et|ttL")


def test_manual_without_boundaries_is_refused() -> None:
    with pytest.raises(LayoutError, match=r"parallel\.boundaries=\[\] has 0 entries"):
        partition("manual", uncounted(), 3)


def test_an_unknown_name_is_refused_with_the_known_ones() -> None:
    with pytest.raises(
        LayoutError, match="use parameters, uniform, flops, profile, memory, type:<regex>, manual or one"
    ):
        partition("best", uncounted(), 3)
