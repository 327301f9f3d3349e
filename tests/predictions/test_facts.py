"""What the partitioners are told, against predictions."""

from __future__ import annotations

from dataclasses import replace

import pytest

from pipekit.errors import LayoutError
from pipekit.partitioners import LayerFacts, partition
from pipekit.predictions.facts import layer_facts
from pipekit.predictions.model_costs import ModelCosts
from pipekit.predictions.prediction import Choice, PlannedModel, plan_tables, predict
from pipekit.predictions.search import SCHEDULES
from predictions.planned import choice, device, gpt, layer, model


def facts_of(planned: PlannedModel, given: Choice, limit_bytes: int = 0) -> LayerFacts:
    return layer_facts(
        planned,
        given,
        plan_tables(given)[0],
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
    facts = facts_of(model([layer(100), layer(200)], loss=layer(50)), choice(pp=2))
    assert facts.costs("flops") == [300, 600]
    assert facts.extras("flops") == [0, 150]
    assert facts.extras("parameters") is None
    assert facts.measure_seconds is None
    assert facts.best_costs == "flops"


def test_seconds_are_those_that_were_measured() -> None:
    facts = facts_of(timed(model([layer()] * 3), [1.0, 2.0, 0.5]), choice(pp=2))
    assert facts.costs("profile") == [2.0, 4.0, 1.0]
    assert partition("profile", facts, 2) == [0, 1, 3]


def test_seconds_of_the_loss_are_the_last_stage_s() -> None:
    planned = timed(model([layer()] * 2), [1.0, 1.0])
    loss = replace(layer(), forward_s=0.5, input_gradient_s=0.25, weight_gradient_s=0.0)
    layers = planned.costs_of(1).layers
    facts = facts_of(replace(planned, costs_of=lambda size: ModelCosts(layers, loss)), choice(pp=2))
    assert facts.extras("profile") == [0, 0.75]


def test_without_seconds_there_is_no_profile() -> None:
    facts = facts_of(model([layer(100), layer(200)]), choice(pp=2))
    with pytest.raises(LayoutError, match=r"parallel\.partition=profile needs the layers' measured seconds"):
        facts.costs("profile")


def test_nothing_is_asked_before_it_is_needed() -> None:
    def refuse(size: int) -> ModelCosts:
        raise AssertionError

    facts = facts_of(replace(model([layer()] * 4), costs_of=lambda size: ModelCosts([layer()] * 4)), choice(pp=2))
    silent = layer_facts(
        replace(model([layer()] * 4), costs_of=refuse),
        choice(pp=2),
        plan_tables(choice(pp=2))[0],
        type_names=facts.type_names,
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
    given = choice(
        pp=2,
        dp=2,
        zero=1,
        schedule=schedule,
        stages_per_rank=SCHEDULES[schedule],
        num_micro_batches=4,
        checkpointing=checkpointing,
    )
    facts = facts_of(planned, given)
    assert facts.memory_limit is not None
    assert facts.placement is not None
    boundaries = partition("flops", facts, len(facts.placement))
    promised = facts.memory_limit().rank_bytes(boundaries, facts.placement)
    predicted = predict(planned, given, device(memory_bytes=10**12), boundaries=boundaries)
    for rank, most in zip(predicted.ranks, promised, strict=True):
        assert rank.memory.total <= most <= 2.5 * rank.memory.total
