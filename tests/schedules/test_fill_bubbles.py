"""Weight gradients into the gaps: what is kept, what is bounded, and what is gained."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipekit.schedules import Costs, Schedule, plan_1f1b, plan_gpipe, plan_zb_h1, simulate, validate
from pipekit.schedules.fill_bubbles import fill_bubbles
from schedules.tables import schedules

EVERYTHING = 10**6


def order_of(schedule: Schedule) -> list[list[tuple[int, bool, int]]]:
    return [[(a.stage, a.kind == "F", a.micro_batch) for a in row if a.kind != "W"] for row in schedule.ranks]


@given(
    schedules,
    st.sampled_from([0.0, 0.5, 2.0]),
    st.sampled_from([0.0, 0.3]),
    st.sampled_from([0, 1, EVERYTHING]),
)
def test_forwards_and_input_gradients_stay_in_order(
    schedule: Schedule, patience: float, transfer_s: float, hold_back: int
) -> None:
    filled = fill_bubbles(
        schedule,
        Costs.uniform(schedule.num_stages, transfer_s=transfer_s),
        max_in_flight=EVERYTHING,
        hold_back=[hold_back] * len(schedule.ranks),
        patience=patience,
        name="filled",
    )
    assert filled is not None
    validate(filled)
    assert order_of(filled) == order_of(schedule)
    for row in filled.ranks:
        waiting = 0
        for action in row:
            waiting += {"F": 0, "I": 1, "W": -1}[action.kind]
            assert waiting <= hold_back + 1


@given(st.integers(1, 6), st.integers(1, 12), st.integers(0, 6))
def test_no_rank_holds_more_than_it_may(pp: int, m: int, room: int) -> None:
    filled = fill_bubbles(
        plan_1f1b(num_stages=pp, num_micro_batches=m),
        Costs.uniform(pp),
        max_in_flight=pp + room,
        hold_back=[EVERYTHING] * pp,
        patience=0.0,
        name="filled",
    )
    assert filled is not None
    assert all(filled.peak_in_flight(rank) <= pp + room for rank in range(pp))


@pytest.mark.parametrize(("pp", "m"), [(1, 3), (2, 8), (4, 8), (8, 16)])
def test_1f1b_filled_is_as_fast_as_zb_h1(pp: int, m: int) -> None:
    costs = Costs.uniform(pp)
    filled = fill_bubbles(
        plan_1f1b(num_stages=pp, num_micro_batches=m),
        costs,
        max_in_flight=pp,
        hold_back=range(pp),
        patience=0.0,
        name="filled",
    )
    assert filled is not None
    h1 = plan_zb_h1(num_stages=pp, num_micro_batches=m)
    assert simulate(filled, costs).step_time_s == simulate(h1, costs).step_time_s


def test_an_order_that_needs_more_room_gives_no_table() -> None:
    filled = fill_bubbles(
        plan_gpipe(num_stages=2, num_micro_batches=4),
        Costs.uniform(2),
        max_in_flight=3,
        hold_back=(0, 0),
        patience=0.0,
        name="filled",
    )
    assert filled is None


@pytest.mark.parametrize(
    ("transfer_s", "rows"),
    [
        (0.0, ["0F0 0F1 0I0 0F2 0I1 0F3 0I2 0W0 0I3 0W1 0W2 0W3", "1F0 1I0 1F1 1I1 1F2 1I2 1F3 1I3 1W0 1W1 1W2 1W3"]),
        # Rank 1 has done all it was sent, and 0F2 reaches it late: meanwhile it does two weight gradients.
        (1.5, ["0F0 0F1 0I0 0F2 0I1 0F3 0W0 0W1 0I2 0W2 0I3 0W3", "1F0 1I0 1F1 1I1 1W0 1W1 1F2 1I2 1F3 1I3 1W2 1W3"]),
    ],
)
def test_the_wait_for_a_message_is_filled(transfer_s: float, rows: list[str]) -> None:
    filled = fill_bubbles(
        plan_1f1b(num_stages=2, num_micro_batches=4),
        Costs.uniform(2, transfer_s=transfer_s),
        max_in_flight=4,
        hold_back=(EVERYTHING, EVERYTHING),
        patience=1.0,
        name="filled",
    )
    assert str(filled).split("\n") == rows
