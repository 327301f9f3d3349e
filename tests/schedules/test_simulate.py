"""The simulator against one that shares no code with it, and against what can be worked out by hand."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipekit.errors import ConfigError, ScheduleError
from pipekit.schedules import (
    Action,
    Costs,
    Schedule,
    Span,
    Timeline,
    median_costs,
    plan_1f1b,
    plan_auto,
    plan_placement,
    plan_schedule,
    plan_zb_h1,
    simulate,
)
from schedules.tables import longest_path_s, schedules

seconds = st.integers(1, 9).map(float)


@given(schedules, seconds, seconds, seconds, st.sampled_from([0.0, 0.5, 3.0]), st.sampled_from([0.0, 0.25]))
def test_the_step_is_the_longest_path(
    schedule: Schedule, f: float, i: float, w: float, transfer_s: float, overhead_s: float
) -> None:
    costs = Costs.uniform(
        schedule.num_stages,
        forward_s=f,
        input_gradient_s=i,
        weight_gradient_s=w,
        transfer_s=transfer_s,
        overhead_s=overhead_s,
    )
    each = {kind: cost + overhead_s for kind, cost in zip("FIWB", (f, i, w, i + w), strict=True)}
    timeline = simulate(schedule, costs)
    assert timeline.step_time_s == longest_path_s(schedule, each, transfer_s)
    for actions, spans in zip(schedule.ranks, timeline.spans, strict=True):
        assert tuple(span.action for span in spans) == actions
        assert all(before.end_s <= after.start_s for before, after in pairwise(spans))


def test_uneven_stages_by_hand() -> None:
    # Rank 1 takes 4 + 4 for each micro-batch and begins after the first forward; rank 0 ends with a backward.
    timeline = simulate(plan_1f1b(num_stages=2, num_micro_batches=3), Costs([1, 4], [1, 2], [1, 2]))
    assert timeline.step_time_s == 1 + 3 * 8 + 2
    assert timeline.bubble_fraction == pytest.approx(1 - (3 * 3 + 3 * 8) / (2 * 27))


def test_memory_is_that_of_the_stages_that_are_in_flight() -> None:
    costs = Costs([1, 1], [1, 1], [1, 1], activation_bytes=[10, 3])
    assert simulate(plan_1f1b(num_stages=2, num_micro_batches=4), costs).peak_bytes == (20, 3)
    assert simulate(plan_zb_h1(num_stages=2, num_micro_batches=4), costs).peak_bytes == (20, 6)


def test_a_deadlock_is_refused() -> None:
    rows = ("0F0 0B0 0F1 0B1", "1F0 1F1 1B0 1B1")
    deadlock = Schedule("mine", 2, tuple(tuple(map(Action.parse, row.split())) for row in rows))
    with pytest.raises(ScheduleError, match="wait for each other for ever"):
        simulate(deadlock, Costs.uniform(2))


@given(schedules.filter(lambda schedule: len(schedule.ranks) > 1 and schedule.num_micro_batches > 1))
def test_measured_costs_give_the_simulation_back(schedule: Schedule) -> None:
    costs = Costs.uniform(
        schedule.num_stages, forward_s=3.0, input_gradient_s=2.0, weight_gradient_s=2.0, transfer_s=0.5
    )
    found = median_costs([simulate(schedule, costs)])
    assert (found.forward_s, found.input_gradient_s, found.weight_gradient_s) == (
        costs.forward_s,
        costs.input_gradient_s,
        costs.weight_gradient_s,
    )
    assert found.transfer_s == 0.5


def test_overhead_is_what_lies_between_actions_that_wait_for_nothing() -> None:
    schedule = plan_1f1b(num_stages=1, num_micro_batches=2)
    starts = (0.0, 1.1, 2.2, 3.3)
    spans = tuple(Span(action, s, s + 1.0) for action, s in zip(schedule.ranks[0], starts, strict=True))
    costs = median_costs([Timeline(schedule, (spans,))])
    assert costs.overhead_s == pytest.approx(0.1)
    assert simulate(schedule, costs).step_time_s == pytest.approx(4.4)


stage_costs = st.lists(st.tuples(seconds, seconds, seconds), min_size=1, max_size=4)


@given(stage_costs, st.integers(1, 9), st.sampled_from([0.0, 1.0]), st.sampled_from([None, 2, 5]), st.booleans())
@settings(max_examples=60)
def test_auto_is_never_worse_than_a_fixed_schedule(
    costs_of: list[tuple[float, float, float]], m: int, transfer_s: float, limit: int | None, two_stages: bool
) -> None:
    pp = len(costs_of)
    stages_per_rank = 2 if two_stages else 1
    costs = Costs(*map(list, zip(*(costs_of * stages_per_rank), strict=True)), transfer_s=transfer_s)
    placement = plan_placement("v", pp=pp, stages_per_rank=stages_per_rank)
    best = plan_auto(costs, placement=placement, num_micro_batches=m, max_in_flight=limit)
    allowed = len(placement) if limit is None else limit
    assert all(best.peak_in_flight(rank) <= allowed for rank in range(pp))
    names = ("zb-v",) if two_stages else ("gpipe", "1f1b", "zb-h1")
    for name in names:
        fixed = plan_schedule(name, pp=pp, num_micro_batches=m)
        if all(fixed.peak_in_flight(rank) <= allowed for rank in range(pp)):
            assert simulate(best, costs).step_time_s <= simulate(fixed, costs).step_time_s


def test_auto_finds_what_fixed_schedules_do_not() -> None:
    uneven = Costs([4, 3, 3, 3], [5, 4, 4, 6], [3, 2, 2, 2], transfer_s=0.5)
    best = plan_auto(uneven, placement=(0, 1, 2, 3), num_micro_batches=8, max_in_flight=8)
    fixed = [plan_schedule(name, pp=4, num_micro_batches=8) for name in ("gpipe", "1f1b", "zb-h1")]
    assert simulate(best, uneven).step_time_s < 0.92 * min(simulate(table, uneven).step_time_s for table in fixed)


@pytest.mark.parametrize(
    ("name", "placement"), [("1f1b", (0, 1, 2, 3)), ("gpipe", (0, 1, 2, 3)), ("interleaved-1f1b", (0, 1, 0, 1))]
)
def test_auto_leaves_backwards_whole_where_every_action_costs_much(name: str, placement: tuple[int, ...]) -> None:
    costs = Costs.uniform(4, overhead_s=5.0)
    pp = max(placement) + 1
    best = plan_auto(costs, placement=placement, num_micro_batches=8, max_in_flight=32)
    assert not best.split_backwards
    fixed = plan_schedule(name, pp=pp, num_micro_batches=8)
    assert simulate(best, costs).step_time_s <= simulate(fixed, costs).step_time_s


def test_auto_beats_zb_v_where_a_stage_is_slow() -> None:
    slow_last = Costs(*[[1, 1, 1, 1, 1, 2]] * 3, transfer_s=0.5)
    best = plan_auto(slow_last, placement=(0, 1, 2, 2, 1, 0), num_micro_batches=8)
    fixed = plan_schedule("zb-v", pp=3, num_micro_batches=8)
    assert simulate(best, slow_last).step_time_s < 0.97 * simulate(fixed, slow_last).step_time_s


def test_a_limit_below_one_micro_batch_a_stage_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"parallel\.max_in_flight=1 is less than the 2 stages of a rank"):
        plan_auto(Costs.uniform(4), placement=(0, 1, 1, 0), num_micro_batches=4, max_in_flight=1)
