"""The learning rate against torch's own schedulers."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipekit.training.lr import learning_rate


def settings(**changes: object) -> dict[str, object]:
    return {"peak": 0.5, "shape": "cosine", "warmup_steps": 0, "decay_steps": 50, "min_ratio": 0.1, **changes}


def test_cosine_is_that_of_torch() -> None:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.5)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=50, eta_min=0.05)
    for step in range(50):
        assert learning_rate(step, **settings()) == pytest.approx(scheduler.get_last_lr()[0])  # type: ignore[arg-type]
        optimizer.step()
        scheduler.step()


def test_linear_is_that_of_torch() -> None:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.5)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=1.0, end_factor=0.1, total_iters=50)
    for step in range(60):
        rate = learning_rate(step, **settings(shape="linear"))  # type: ignore[arg-type]
        assert rate == pytest.approx(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()


def test_warm_up_rises_from_the_first_step_and_meets_the_decay() -> None:
    rates = [learning_rate(step, **settings(warmup_steps=10)) for step in range(60)]  # type: ignore[arg-type]
    assert rates[:10] == pytest.approx([0.5 * (step + 1) / 10 for step in range(10)])
    assert rates[10] == pytest.approx(0.5)
    assert all(later <= earlier for earlier, later in pairwise(rates[10:]))
    assert rates[50:] == pytest.approx([0.05] * 10)


def test_constant_stays() -> None:
    rates = {learning_rate(step, **settings(shape="constant")) for step in (0, 25, 99)}  # type: ignore[arg-type]
    assert rates == {0.5}


@given(
    st.integers(0, 200),
    st.sampled_from(["cosine", "linear", "constant"]),
    st.integers(0, 50),
    st.integers(1, 100),
    st.floats(0, 1),
)
def test_it_is_positive_and_below_the_peak_whatever_the_settings(
    step: int, shape: str, warmup_steps: int, decay_steps: int, min_ratio: float
) -> None:
    rate = learning_rate(
        step,
        peak=0.5,
        shape=shape,  # type: ignore[arg-type]
        warmup_steps=warmup_steps,
        decay_steps=decay_steps,
        min_ratio=min_ratio,
    )
    lowest = 0.5 / warmup_steps if step < warmup_steps else 0.5 * min_ratio
    assert lowest * (1 - 1e-12) <= rate <= 0.5 * (1 + 1e-12)


def test_a_warm_up_longer_than_the_decay_ends_at_the_floor() -> None:
    rates = [learning_rate(step, **settings(warmup_steps=80)) for step in range(83)]  # type: ignore[arg-type]
    assert rates[79:81] == pytest.approx([0.5, 0.5])
    assert rates[81:] == pytest.approx([0.05, 0.05])
