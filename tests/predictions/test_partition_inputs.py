"""Inputs of the partitioners, against predictions."""

from __future__ import annotations

from dataclasses import replace

import pytest

from pipekit.errors import LayoutError
from pipekit.partitioners import PartitionInputs, partition
from pipekit.predictions.layer_costs import ModelCosts
from pipekit.predictions.parallel_plan import ParallelPlan
from pipekit.predictions.partition_inputs import partition_inputs
from pipekit.predictions.prediction import PlannedModel, predict
from pipekit.predictions.search import SCHEDULES
from predictions.planned import device, gpt, layer, model, plan


def inputs_of(planned: PlannedModel, given: ParallelPlan, limit_bytes: int = 0) -> PartitionInputs:
    return partition_inputs(
        planned,
        given,
        given.plan_schedules()[0],
        type_names=["Layer"] * len(planned.layer_names),
        limit_bytes=lambda: limit_bytes,
    )


def timed(planned: PlannedModel, seconds: list[float]) -> PlannedModel:
    costs = planned.costs_of(1)
    layers = [
        replace(one, forward_s=time_s, input_gradient_s=time_s, weight_gradient_s=0.0)
        for one, time_s in zip(costs.layers, seconds, strict=True)
    ]
    return replace(planned, costs_of=lambda size: ModelCosts(layers, None), is_timed=True)


def test_operations_and_the_loss_count() -> None:
    inputs = inputs_of(model([layer(100), layer(200)], loss=layer(50)), plan(pp=2))
    assert inputs.costs("flops") == [300, 600]
    assert inputs.extras("flops") == [0, 150]
    assert inputs.extras("parameters") is None
    assert inputs.measure_seconds is None
    assert inputs.best_costs == "flops"


def test_seconds_are_those_that_were_measured() -> None:
    inputs = inputs_of(timed(model([layer()] * 3), [1.0, 2.0, 0.5]), plan(pp=2))
    assert inputs.costs("profile") == [2.0, 4.0, 1.0]
    assert partition("profile", inputs, 2) == [0, 1, 3]


def test_seconds_of_the_loss_are_the_last_stage_s() -> None:
    planned = timed(model([layer()] * 2), [1.0, 1.0])
    loss = replace(layer(), forward_s=0.5, input_gradient_s=0.25, weight_gradient_s=0.0)
    layers = planned.costs_of(1).layers
    inputs = inputs_of(replace(planned, costs_of=lambda size: ModelCosts(layers, loss)), plan(pp=2))
    assert inputs.extras("profile") == [0, 0.75]


def test_without_seconds_there_is_no_profile() -> None:
    inputs = inputs_of(model([layer(100), layer(200)]), plan(pp=2))
    with pytest.raises(LayoutError, match=r"parallel\.partition=profile needs the layers' measured seconds"):
        inputs.costs("profile")


def test_nothing_is_asked_before_it_is_needed() -> None:
    def refuse(size: int) -> ModelCosts:
        raise AssertionError

    inputs = inputs_of(replace(model([layer()] * 4), costs_of=lambda size: ModelCosts([layer()] * 4)), plan(pp=2))
    silent = partition_inputs(
        replace(model([layer()] * 4), costs_of=refuse),
        plan(pp=2),
        plan(pp=2).plan_schedules()[0],
        type_names=inputs.type_names,
        limit_bytes=lambda: 0,
    )
    assert partition("parameters", silent, 2) == [0, 2, 4]


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_partition_within_the_memory_fits_by_the_prediction_too(
    schedule: str, checkpointing: bool, precision: str
) -> None:
    planned = gpt(4, 256, 4, precision)  # type: ignore[arg-type]
    given = plan(
        pp=2,
        dp=2,
        zero=1,
        schedule=schedule,
        stages_per_rank=SCHEDULES[schedule],
        num_micro_batches=4,
        checkpointing=checkpointing,
    )
    inputs = inputs_of(planned, given)
    assert inputs.memory_limit is not None
    assert inputs.placement is not None
    boundaries = partition("flops", inputs, len(inputs.placement))
    promised = inputs.memory_limit().rank_bytes(boundaries, inputs.placement)
    predicted = predict(planned, given, device(memory_bytes=10**12), boundaries)
    for rank, most in zip(predicted.ranks, promised, strict=True):
        assert rank.memory.total <= most <= 2.5 * rank.memory.total
