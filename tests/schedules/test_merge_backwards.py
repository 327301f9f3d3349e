"""Whole backwards in place of split ones: what stays, what is gained."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipekit.schedules import Costs, Schedule, plan_1f1b, plan_schedule, plan_zb_h1, simulate, validate
from pipekit.schedules.merge_backwards import merge_backwards
from schedules.tables import schedules


@settings(max_examples=60)
@given(schedules, st.sampled_from([0.0, 0.3]), st.sampled_from([0.0, 0.1]))
def test_the_step_gets_no_longer_and_the_order_stays(schedule: Schedule, transfer_s: float, overhead_s: float) -> None:
    costs = Costs.uniform(schedule.num_stages, transfer_s=transfer_s, overhead_s=overhead_s)
    joined = merge_backwards(schedule, costs)
    validate(joined)
    assert simulate(joined, costs).step_time_s <= simulate(schedule, costs).step_time_s * (1 + 1e-6)
    for before, after in zip(schedule.ranks, joined.ranks, strict=True):
        kept = [(a.stage, a.kind == "F", a.micro_batch) for a in before if a.kind != "W"]
        assert kept == [(a.stage, a.kind == "F", a.micro_batch) for a in after if a.kind != "W"]
    assert all(joined.peak_in_flight(rank) <= schedule.peak_in_flight(rank) for rank in range(len(schedule.ranks)))


def test_the_first_rank_never_splits_under_zb_h1_and_a_rank_behind_splits_what_it_must() -> None:
    schedule = plan_zb_h1(num_stages=4, num_micro_batches=8)
    joined = merge_backwards(schedule, Costs.uniform(4))
    assert not any(stage == 0 for stage, _ in joined.split_backwards)
    assert any(stage == 3 for stage, _ in joined.split_backwards)
    # With whole backwards alone it would be 1F1B, whose step is longer.
    whole = simulate(plan_1f1b(num_stages=4, num_micro_batches=8), Costs.uniform(4)).step_time_s
    assert simulate(joined, Costs.uniform(4)).step_time_s < whole


def test_without_bubbles_to_fill_every_backward_is_merged() -> None:
    assert not merge_backwards(plan_zb_h1(num_stages=1, num_micro_batches=5), Costs.uniform(1)).split_backwards


@pytest.mark.parametrize("costs", [None, Costs.uniform(4)])
def test_auto_stays_split_until_its_costs_are_known(costs: Costs | None) -> None:
    schedule = plan_schedule("auto", pp=4, num_micro_batches=8, costs=costs)
    stages = {stage for stage, _ in schedule.split_backwards}
    assert (stages == {0, 1, 2, 3}) == (costs is None)
