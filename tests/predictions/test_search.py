"""Layouts compared, against predictions of all of them."""

from __future__ import annotations

from dataclasses import replace

import pytest

from pipekit.predictions import search
from pipekit.predictions.devices import Device, find_device
from pipekit.predictions.prediction import PlannedModel, Prediction
from pipekit.predictions.search import (
    OutOfMemory,
    SearchSpace,
    parallel_plans,
    search_layouts,
    why_impossible,
)
from predictions.planned import device, gpt, layer, model, plan, predict

SPACE = SearchSpace(8, 32, micro_batch_sizes=(1, 2, 4))


def all_predictions(planned: PlannedModel, space: SearchSpace, on: Device) -> list[Prediction]:
    """Return every layout that can be built, the fastest first, whether it fits or not."""
    possible = [given for given in parallel_plans(planned, space) if why_impossible(planned, given, on) is None]
    return sorted((predict(planned, given, on) for given in possible), key=lambda found: found.step_time_s)


@pytest.fixture(scope="module")
def small() -> PlannedModel:
    return gpt(6, 768, 12, "bf16")


@pytest.fixture(scope="module")
def everything(small: PlannedModel) -> list[Prediction]:
    return all_predictions(small, SPACE, find_device("h100"))


@pytest.mark.parametrize("share", [0.2, 0.5, 0.9, 1.0])
def test_the_best_that_fits_is_found_and_nothing_that_fits_is_rejected(
    small: PlannedModel, everything: list[Prediction], share: float
) -> None:
    needs = sorted(found.memory_bytes for found in everything)
    limit = needs[int(share * (len(needs) - 1))]
    found = search_layouts(
        small,
        SPACE,
        find_device("h100").model_copy(update={"memory_bytes": limit, "reserve_bytes": 0}),
        num_ranked=1000,
    )
    fitting = [other for other in everything if other.memory_bytes <= limit]
    assert found.num_open == 0
    assert {prediction.plan for prediction in found.ranked} == {other.plan for other in fitting}
    assert found.num_fitting == len(fitting)
    roomy = [other for other in fitting if other.memory_bytes <= 0.95 * limit]
    assert found.ranked[0].step_time_s == pytest.approx((roomy or fitting)[0].step_time_s)
    # Those that leave no room come last.
    assert [prediction.memory_bytes <= 0.95 * limit for prediction in found.ranked] == [
        position < len(roomy) for position in range(len(fitting))
    ]
    assert len(found.rejected) + len(found.ranked) == len(list(parallel_plans(small, SPACE)))
    assert all(reason for _, reason in found.rejected)


def test_where_not_all_are_simulated_the_first_is_hardly_slower_than_the_best(
    small: PlannedModel, everything: list[Prediction], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(search, "_MOST_SIMULATED", 0)
    found = search_layouts(small, SPACE, find_device("h100"))
    assert len(found.ranked) == 1
    assert found.num_open == len(everything) - 1
    assert found.ranked[0].step_time_s < 1.2 * everything[0].step_time_s


def test_the_fastest_stands_first() -> None:
    found = search_layouts(model([layer()] * 8), SPACE, device(), num_ranked=5)
    times = [prediction.step_time_s for prediction in found.ranked]
    assert times == sorted(times)
    assert len(times) == 5
    assert found.num_fitting > 5


def test_what_does_not_fit_says_how_much_it_lacks() -> None:
    found = search_layouts(model([layer()] * 8), SPACE, device(memory_bytes=1))
    assert found.ranked == ()
    reasons = [reason for _, reason in found.rejected]
    nearest = reasons[0]
    assert isinstance(nearest, OutOfMemory)
    assert nearest.lacking_bytes == nearest.needed_bytes - 1 > 0


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"pp": 8, "schedule": "zb-v", "stages_per_rank": 2}, "has 16 stages, more than the 8 layers"),
        ({"tp": 16}, "has 16 tensor-parallel ranks, more than the 8 devices of a node"),
        (
            {"pp": 4, "schedule": "interleaved-1f1b", "stages_per_rank": 2, "num_micro_batches": 6},
            "has 6 micro-batches under interleaved-1f1b, which pp=4 does not divide",
        ),
        ({"pp": 8, "num_micro_batches": 6}, None),
    ],
)
def test_what_cannot_be_built_says_why(changes: dict[str, object], reason: str | None) -> None:
    assert why_impossible(model([layer()] * 8), plan(**changes), device()) == reason


def test_every_choice_fills_the_devices_with_the_batch() -> None:
    planned = model([layer()] * 8)
    found = list(parallel_plans(planned, SearchSpace(12, 24, tp=(1, 2, 8))))
    assert all(given.layout.world_size == 12 and given.global_batch_size == 24 for given in found)
    assert {given.layout.tp for given in found} == {1, 2}
    assert len(set(found)) == len(found)
    assert {given.layout.pp for given in found} == {1, 2, 3, 4, 6}
    assert all(given.zero == 0 for given in found if given.layout.dp == 1)
    # One rank has no schedule to choose.
    assert {given.schedule for given in found if given.layout.pp == 1} == {"1f1b"}


def test_in_16_bits_there_is_no_zero_0() -> None:
    planned = model([layer()] * 8, precision="bf16")
    assert {given.zero for given in parallel_plans(planned, SPACE)} == {1}


def test_zero_2_and_3_are_for_layouts_that_can_have_them() -> None:
    planned = model([layer()] * 8, precision="bf16")
    found = list(parallel_plans(planned, replace(SPACE, tp=(1, 2), zero=(0, 1, 2, 3))))
    assert {(given.layout.pp > 1, given.layout.tp > 1, given.zero) for given in found} == {
        *((False, False, zero) for zero in (1, 2, 3)),
        *((False, True, zero) for zero in (1, 2)),
        *((True, is_sharded, 1) for is_sharded in (False, True)),
    }


def test_the_same_search_finds_the_same() -> None:
    planned = model([layer(parameters=1000)] * 8)
    assert search_layouts(planned, SPACE, device()) == search_layouts(planned, SPACE, device())
