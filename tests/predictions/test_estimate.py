"""Estimates, against simulations."""

from __future__ import annotations

import pytest

from pipekit.predictions.devices import find_device
from pipekit.predictions.estimate import Estimator
from pipekit.predictions.search import SCHEDULES, SearchSpace, parallel_plans, why_impossible
from pipekit.predictions.timing import Cluster
from pipekit.schedules import plan_zb_v
from predictions.planned import device, gpt, layer, model, plan, predict


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("pp", [2, 4, 16])
@pytest.mark.parametrize("num_micro_batches", [16, 64])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_balanced_stages_are_estimated_within_a_tenth(
    schedule: str, pp: int, num_micro_batches: int, checkpointing: bool
) -> None:
    planned = model([layer(1000)] * 32)
    given = plan(
        pp=pp,
        schedule=schedule,
        stages_per_rank=SCHEDULES[schedule],
        num_micro_batches=num_micro_batches,
        checkpointing=checkpointing,
    )
    estimate = Estimator(planned).estimate(given, Cluster(device(), given.layout))
    assert estimate.step_time_s == pytest.approx(predict(planned, given, device()).step_time_s, rel=0.1)


@pytest.mark.parametrize("schedule", ["1f1b", "zb-h1"])
def test_tensor_parallel_ranks_hide_as_much_in_an_estimate_as_in_a_prediction(schedule: str) -> None:
    # A schedule that splits backwards hides nothing, and one that does not half of what these ranks send.
    planned, h100 = gpt(24, 2048, 16, "bf16"), find_device("h100")
    given = plan(pp=2, tp=8, schedule=schedule, num_micro_batches=32, sequence_parallel=False)
    estimate = Estimator(planned).estimate(given, Cluster(h100, given.layout))
    assert estimate.step_time_s == pytest.approx(predict(planned, given, h100).step_time_s, rel=0.02)


@pytest.mark.parametrize(("precision", "num_devices", "tp"), [("fp32", 4, (1,)), ("bf16", 8, (1, 2))])
def test_what_is_held_at_least_is_never_more_than_what_is_held(
    precision: str, num_devices: int, tp: tuple[int, ...]
) -> None:
    planned, h100 = gpt(6, 768, 12, precision), find_device("h100")  # type: ignore[arg-type]
    estimator = Estimator(planned)
    checked = 0
    for given in parallel_plans(planned, SearchSpace(num_devices, 16, tp=tp, micro_batch_sizes=(1, 4))):
        if why_impossible(planned, given, h100) is None:
            least = estimator.estimate(given, Cluster(h100, given.layout)).least_bytes
            assert least <= predict(planned, given, h100).memory_bytes, given
            checked += 1
    assert checked > 30


def test_cuts_of_other_micro_batches_are_the_same() -> None:
    estimator = Estimator(model([layer()] * 8))
    small = estimator.boundaries(plan(pp=4, micro_batch_size=1))
    assert estimator.boundaries(plan(pp=4, micro_batch_size=4)) is small


def test_stages_hold_what_the_table_says() -> None:
    assert plan_zb_v(pp=2, num_micro_batches=1).peak_of_stages() == [1, 1, 1, 1]
