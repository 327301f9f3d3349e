"""The tables of the generators: literally where they are small, by what the literature claims where they are not."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipekit.errors import ConfigError
from pipekit.schedules import (
    Costs,
    Schedule,
    default_stages_per_rank,
    plan_1f1b,
    plan_forward_only,
    plan_gpipe,
    plan_interleaved_1f1b,
    plan_placement,
    plan_schedule,
    plan_zb_h1,
    plan_zb_v,
    read_csv,
    schedule_placement,
    simulate,
    validate,
    write_csv,
)
from schedules.tables import schedules

degrees = st.integers(1, 8)
micro_batches = st.integers(1, 24)


def step_time(schedule: Schedule, stages_per_rank: int = 1) -> float:
    """Return the step time where a rank's forward, input gradient and weight gradient take 1 each."""
    cost = 1 / stages_per_rank
    costs = Costs.uniform(schedule.num_stages, forward_s=cost, input_gradient_s=cost, weight_gradient_s=cost)
    return simulate(schedule, costs).step_time_s


def peaks(schedule: Schedule) -> list[int]:
    return [schedule.peak_in_flight(rank) for rank in range(len(schedule.ranks))]


@given(schedules)
def test_every_table_can_be_run(schedule: Schedule) -> None:
    validate(schedule)


@pytest.mark.parametrize(
    ("schedule", "rows"),
    [
        (plan_gpipe(num_stages=2, num_micro_batches=2), ["0F0 0F1 0B0 0B1", "1F0 1F1 1B0 1B1"]),
        (
            plan_1f1b(num_stages=3, num_micro_batches=3),
            ["0F0 0F1 0F2 0B0 0B1 0B2", "1F0 1F1 1B0 1F2 1B1 1B2", "2F0 2B0 2F1 2B1 2F2 2B2"],
        ),
        (
            plan_zb_h1(num_stages=2, num_micro_batches=3),
            ["0F0 0F1 0I0 0W0 0F2 0I1 0W1 0I2 0W2", "1F0 1I0 1F1 1I1 1W0 1F2 1I2 1W1 1W2"],
        ),
        (
            plan_interleaved_1f1b(pp=2, stages_per_rank=2, num_micro_batches=2),
            ["0F0 0F1 2F0 2F1 2B0 2B1 0B0 0B1", "1F0 1F1 3F0 3B0 3F1 3B1 1B0 1B1"],
        ),
        (plan_zb_v(pp=2, num_micro_batches=1), ["0F0 3F0 3I0 3W0 0I0 0W0", "1F0 2F0 2I0 1I0 2W0 1W0"]),
        (plan_forward_only(num_stages=4, num_micro_batches=1, placement=(0, 1, 1, 0)), ["0F0 3F0", "1F0 2F0"]),
    ],
    ids=lambda value: value.name if isinstance(value, Schedule) else "",
)
def test_small_tables(schedule: Schedule, rows: list[str]) -> None:
    assert str(schedule).split("\n") == rows


@given(degrees, micro_batches)
def test_gpipe_and_1f1b_take_the_time_of_a_full_and_an_empty_pipeline(pp: int, m: int) -> None:
    for plan in (plan_gpipe, plan_1f1b):
        assert step_time(plan(num_stages=pp, num_micro_batches=m)) == 3 * (m + pp - 1)
    assert peaks(plan_gpipe(num_stages=pp, num_micro_batches=m)) == [m] * pp
    assert peaks(plan_1f1b(num_stages=pp, num_micro_batches=m)) == [min(pp - rank, m) for rank in range(pp)]


@given(degrees, micro_batches)
def test_zb_h1_has_a_third_of_the_bubble_at_the_same_peak(pp: int, m: int) -> None:
    schedule = plan_zb_h1(num_stages=pp, num_micro_batches=m)
    if m >= pp:
        assert step_time(schedule) == 3 * m + pp - 1
    assert max(peaks(schedule)) == min(pp, m)


@given(degrees, st.integers(1, 4), st.integers(2, 4))
def test_interleaving_shortens_the_bubble_by_the_number_of_stages_on_a_rank(pp: int, groups: int, v: int) -> None:
    m = groups * pp
    schedule = plan_interleaved_1f1b(pp=pp, stages_per_rank=v, num_micro_batches=m)
    assert step_time(schedule, v) == pytest.approx(3 * m + 3 * (pp - 1) / v)


@given(st.integers(1, 16), st.integers(1, 48))
def test_zb_v_waits_for_half_a_forward_of_each_other_rank(pp: int, m: int) -> None:
    schedule = plan_zb_v(pp=pp, num_micro_batches=m)
    validate(schedule)
    assert max(peaks(schedule)) <= 2 * pp
    # With fewer micro-batches than ranks it is the way of the first one up and down the V that takes longest.
    expected = 3 * m + (pp - 1) / 2 if m >= pp else (3 * m + 4 * pp - 2) / 2
    assert step_time(schedule, 2) == pytest.approx(expected)


@pytest.mark.parametrize(("pp", "m"), [(2, 8), (4, 8), (8, 16), (8, 32)])
@pytest.mark.parametrize("transfer_s", [0.05, 0.1, 0.2])
def test_zb_v_stands_transfers_and_uneven_gradients(pp: int, m: int, transfer_s: float) -> None:
    def seconds(schedule: Schedule, stages_per_rank: int) -> float:
        forward_s, inputs_s, weights_s = (cost / stages_per_rank for cost in (1.0, 1.3, 0.7))
        costs = Costs.uniform(
            schedule.num_stages,
            forward_s=forward_s,
            input_gradient_s=inputs_s,
            weight_gradient_s=weights_s,
            transfer_s=transfer_s,
        )
        return simulate(schedule, costs).step_time_s

    assert seconds(plan_zb_v(pp=pp, num_micro_batches=m), 2) < seconds(
        plan_zb_h1(num_stages=pp, num_micro_batches=m), 1
    )


def test_planning_sixteen_ranks_and_128_micro_batches_takes_no_longer_than_two_seconds() -> None:
    for name in ("gpipe", "1f1b", "interleaved-1f1b", "zb-h1", "zb-v"):
        began_s = time.process_time()
        plan_schedule(name, pp=16, num_micro_batches=128)
        assert time.process_time() - began_s < 2


def test_placements() -> None:
    assert plan_placement("looped", pp=3, stages_per_rank=2) == (0, 1, 2, 0, 1, 2)
    assert plan_placement("v", pp=2, stages_per_rank=3) == (0, 1, 1, 0, 0, 1)
    assert schedule_placement("zb-v", pp=3) == (0, 1, 2, 2, 1, 0)
    assert schedule_placement("auto", pp=3) == (0, 1, 2)
    assert schedule_placement("interleaved-1f1b", pp=2, stages_per_rank=3) == (0, 1, 0, 1, 0, 1)
    assert [default_stages_per_rank(name) for name in ("1f1b", "zb-v", "interleaved-1f1b", "auto")] == [1, 2, 2, 1]


@pytest.mark.parametrize(
    ("name", "options", "says"),
    [
        (
            "interleaved-1f1b",
            {"num_micro_batches": 6},
            "parallel.schedule=interleaved-1f1b needs a multiple of parallel.pp=4 micro-batches, and a step has 6; "
            "try 4 or 8",
        ),
        ("interleaved-1f1b", {"num_micro_batches": 2}, "a step has 2; try 4 "),
        ("interleaved-1f1b", {"stages_per_rank": 1}, "needs 2 stages a rank or more, not parallel.stages_per_rank=1"),
        ("zb-v", {"stages_per_rank": 3}, "parallel.schedule=zb-v runs 2 stages on each rank"),
        ("zb-h1", {"stages_per_rank": 2}, "parallel.schedule=zb-h1 runs one stage on each rank"),
        ("auto", {"max_in_flight": 1, "stages_per_rank": 2}, "parallel.max_in_flight=1 is less than the 2 stages"),
        ("auto", {"stages_per_rank": 0}, "parallel.schedule=auto needs a stage on each rank or more"),
        ("auto", {"costs": Costs.uniform(3)}, "costs of 3 stages were given, and the pipeline has 4"),
        ("1f1b", {"num_micro_batches": 0}, "parallel.schedule=1f1b: a step needs at least one micro-batch, and has 0"),
        ("fifo", {}, "parallel.schedule=fifo is none of gpipe, 1f1b"),
        ("no/such.csv", {}, "parallel.schedule=no/such.csv: there is no such file"),
    ],
)
def test_sizes_that_a_schedule_cannot_run_are_refused(name: str, options: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        plan_schedule(name, **{"pp": 4, "num_micro_batches": 8, **options})
    assert says in str(caught.value)


def test_a_name_that_is_none_has_no_stages() -> None:
    for ask in (default_stages_per_rank, lambda name: schedule_placement(name, pp=2, stages_per_rank=1)):
        with pytest.raises(ConfigError, match=r"parallel\.schedule=fifo is none of"):
            ask("fifo")


def test_a_file_must_fit_the_run(tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    write_csv(plan_zb_v(pp=2, num_micro_batches=4), path)
    assert plan_schedule(str(path), pp=2, num_micro_batches=4).ranks == read_csv(path).ranks
    assert default_stages_per_rank(str(path)) == 2
    assert schedule_placement(str(path), pp=2) == (0, 1, 1, 0)
    with pytest.raises(ConfigError, match=r"has 2 rows, one for each pipeline rank, and parallel\.pp=4"):
        plan_schedule(str(path), pp=4, num_micro_batches=4)
    with pytest.raises(ConfigError, match="is for 4 micro-batches, and a step has 8"):
        plan_schedule(str(path), pp=2, num_micro_batches=8)
