"""The learning rates against the schedulers of torch, transformers and DeepSpeed."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, LinearLR

from pipekit.optimizers.learning_rates import SCHEDULES, argument_faults, schedule_name, scheduler_section

PEAK, DECAY, FLOOR, STEPS = 0.5, 50, 0.1, 60


def rates(name: str, *, steps: int = STEPS, warmup_steps: int = 0, **args: Any) -> list[float]:
    section = {"warmup_steps": warmup_steps, "decay_steps": DECAY, "min_lr_ratio": FLOOR}
    rate, _ = SCHEDULES[name].bind(peak=PEAK, section=section, args=args)
    return [rate(step) for step in range(steps)]


def sgd() -> torch.optim.Optimizer:
    return torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=PEAK)


def theirs(build: Callable[[torch.optim.Optimizer], Any], *, steps: int = STEPS) -> list[float]:
    """Rates of the updates under a scheduler that steps after each of them."""
    optimizer, found = sgd(), []
    scheduler = build(optimizer)
    for _ in range(steps):
        found.append(float(optimizer.param_groups[0]["lr"]))
        optimizer.step()
        scheduler.step()
    return found


def cosine_of_torch(optimizer: torch.optim.Optimizer) -> LambdaLR | CosineAnnealingLR:
    return CosineAnnealingLR(optimizer, T_max=DECAY, eta_min=PEAK * FLOOR)


def test_cosine_is_that_of_torch() -> None:
    # Torch's rises again after its end.
    assert rates("cosine", steps=DECAY) == pytest.approx(theirs(cosine_of_torch, steps=DECAY))


def test_linear_is_that_of_torch() -> None:
    build = lambda optimizer: LinearLR(optimizer, start_factor=1.0, end_factor=FLOOR, total_iters=DECAY)  # noqa: E731
    assert rates("linear") == pytest.approx(theirs(build))


AFTER_WARM_UP: dict[str, tuple[Callable[[torch.optim.Optimizer], LambdaLR], dict[str, Any]]] = {
    "polynomial": (
        lambda optimizer: transformers.get_polynomial_decay_schedule_with_warmup(
            optimizer, 10, DECAY, lr_end=PEAK * FLOOR, power=3.0
        ),
        {"power": 3.0},
    ),
    "inverse_sqrt": (lambda optimizer: transformers.get_inverse_sqrt_schedule(optimizer, 10), {}),
    "inverse_sqrt-slower": (
        lambda optimizer: transformers.get_inverse_sqrt_schedule(optimizer, 10, timescale=25),
        {"timescale_steps": 25},
    ),
    "wsd": (
        lambda optimizer: transformers.get_wsd_schedule(
            optimizer, 10, 15, num_stable_steps=25, decay_type="cosine", min_lr_ratio=FLOOR
        ),
        {"cooldown_steps": 15, "cooldown": "cosine"},
    ),
    "wsd-linear": (
        lambda optimizer: transformers.get_wsd_schedule(
            optimizer, 10, 15, num_stable_steps=25, decay_type="linear", min_lr_ratio=FLOOR
        ),
        {"cooldown_steps": 15},
    ),
    "wsd-1-sqrt": (
        lambda optimizer: transformers.get_wsd_schedule(
            optimizer, 10, 15, num_stable_steps=25, decay_type="1-sqrt", min_lr_ratio=FLOOR
        ),
        {"cooldown_steps": 15, "cooldown": "1-sqrt"},
    ),
}


@pytest.mark.parametrize("case", AFTER_WARM_UP)
def test_decays_are_those_of_transformers(case: str) -> None:
    build, args = AFTER_WARM_UP[case]
    # Theirs begins its warm-up at zero, ours so that the first update moves the weights.
    assert rates(case.partition("-")[0], warmup_steps=10, **args)[10:] == pytest.approx(theirs(build)[10:])


DEEPSPEED: dict[str, dict[str, Any]] = {
    "LRRangeTest": {"lr_range_test_min_lr": 1e-4, "lr_range_test_step_size": 7, "lr_range_test_step_rate": 3.0},
    "LRRangeTest-stairs": {
        "lr_range_test_min_lr": 1e-4,
        "lr_range_test_step_size": 7,
        "lr_range_test_staircase": True,
    },
    "OneCycle": {"cycle_min_lr": 1e-3, "cycle_max_lr": 0.02, "cycle_first_step_size": 10},
    "OneCycle-decay": {
        "cycle_min_lr": 1e-3,
        "cycle_max_lr": 0.02,
        "cycle_first_step_size": 10,
        "cycle_second_step_size": 14,
        "decay_step_size": 5,
        "decay_lr_rate": 0.5,
        "decay_mom_rate": 0.01,
    },
    "OneCycle-stairs": {
        "cycle_min_lr": 1e-3,
        "cycle_max_lr": 0.02,
        "cycle_first_step_size": 12,
        "cycle_first_stair_count": 4,
        "cycle_second_stair_count": 3,
    },
    "WarmupLR": {"warmup_max_lr": 0.02, "warmup_num_steps": 12},
    "WarmupLR-linear": {"warmup_min_lr": 1e-3, "warmup_num_steps": 12, "warmup_type": "linear"},
    "WarmupDecayLR": {"total_num_steps": 40, "warmup_max_lr": 0.02, "warmup_min_lr": 1e-3, "warmup_num_steps": 12},
    "WarmupDecayLR-linear": {"total_num_steps": 40, "warmup_num_steps": 12, "warmup_type": "linear"},
    "WarmupCosineLR": {"total_num_steps": 40, "warmup_num_steps": 12, "warmup_min_ratio": 0.05, "cos_min_ratio": 0.01},
    "WarmupCosineLR-linear": {"total_num_steps": 40, "warmup_num_steps": 1, "warmup_type": "linear"},
}


@pytest.mark.parametrize("case", DEEPSPEED)
def test_deepspeeds_names_lead_to_its_rates_and_momenta(case: str) -> None:
    from deepspeed.runtime import lr_schedules

    kind, params = case.partition("-")[0], DEEPSPEED[case]
    optimizer = torch.optim.AdamW([torch.zeros(1, requires_grad=True)], lr=PEAK)
    scheduler = getattr(lr_schedules, kind)(optimizer, **params)
    section = scheduler_section({"type": kind, "params": params})
    schedule = SCHEDULES[section["type"]]
    assert list(argument_faults(schedule, section["args"])) == []
    rate, momentum = schedule.bind(peak=PEAK, section={"decay_steps": DECAY}, args=section["args"])
    for step in range(STEPS):
        group = optimizer.param_groups[0]
        assert rate(step) == pytest.approx(group["lr"]), step
        # DeepSpeed begins with the lowest momentum, and takes the highest from the second update on.
        if kind == "OneCycle" and step:
            assert momentum(step) == pytest.approx(group["betas"][0]), step
        optimizer.step()
        scheduler.step()


def test_a_cycle_begins_with_its_highest_momentum_and_may_leave_the_optimizers() -> None:
    args = {"cycle_min_lr": 0.01, "cycle_min_mom": 0.7, "cycle_max_mom": 0.95}
    _, momentum = SCHEDULES["one_cycle"].bind(peak=PEAK, section={}, args=args)
    assert momentum(0) == 0.95
    _, momentum = SCHEDULES["one_cycle"].bind(peak=PEAK, section={}, args={**args, "cycle_momentum": False})
    assert momentum(0) is None


def test_warm_up_rises_from_the_first_step_and_meets_the_decay() -> None:
    found = rates("cosine", warmup_steps=10)
    assert found[:10] == pytest.approx([PEAK * (step + 1) / 10 for step in range(10)])
    assert found[10] == pytest.approx(PEAK)
    assert all(later <= earlier for earlier, later in pairwise(found[10:]))
    assert found[50:] == pytest.approx([PEAK * FLOOR] * 10)


def test_constant_stays() -> None:
    assert set(rates("constant")) == {PEAK}


def test_exponential_rises_by_the_same_factor() -> None:
    found = rates("exponential", min_lr=0.005, rise_steps=40)
    assert [found[step] for step in (0, 20, 40, 50)] == pytest.approx([0.005, 0.05, 0.5, 0.5])
    assert {round(later / earlier, 9) for earlier, later in pairwise(found[:41])} == {round(100 ** (1 / 40), 9)}


@given(
    st.integers(0, 200),
    st.sampled_from(["cosine", "linear", "constant", "polynomial", "wsd"]),
    st.integers(0, 50),
    st.integers(1, 100),
    st.floats(0, 1),
)
def test_it_is_positive_and_below_the_peak_whatever_the_settings(
    step: int, name: str, warmup_steps: int, decay_steps: int, min_lr_ratio: float
) -> None:
    section = {"warmup_steps": warmup_steps, "decay_steps": decay_steps, "min_lr_ratio": min_lr_ratio}
    rate, _ = SCHEDULES[name].bind(peak=PEAK, section=section, args={})
    lowest = PEAK / warmup_steps if step < warmup_steps else PEAK * min_lr_ratio
    assert lowest * (1 - 1e-12) <= rate(step) <= PEAK * (1 + 1e-12)


def test_a_warm_up_longer_than_the_decay_ends_at_the_floor() -> None:
    found = rates("cosine", warmup_steps=80, steps=83)
    assert found[79:81] == pytest.approx([PEAK, PEAK])
    assert found[81:] == pytest.approx([PEAK * FLOOR] * 2)


@pytest.mark.parametrize(
    ("name", "args", "faults"),
    [
        ("wsd", {"cooldown_stps": 3}, {"cooldown_stps": "did you mean cooldown_steps?"}),
        ("cosine", {"power": 2.0}, {"power": "it takes none"}),
        ("wsd", {"cooldown": "sqrt"}, {"cooldown": "input should be 'linear', 'cosine' or '1-sqrt', and is 'sqrt'"}),
        ("warmup_lr", {"warmup_num_steps": 0}, {"warmup_num_steps": "greater than 0, and is 0"}),
        ("one_cycle", {}, {"cycle_min_lr": "is missing"}),
        ("wsd", {"warmup_steps": 3}, {"warmup_steps": "use scheduler.warmup_steps"}),
        ("wsd", {"peak": 3}, {"peak": "use optimizer.lr"}),
    ],
)
def test_arguments_are_checked(name: str, args: dict[str, Any], faults: dict[str, str]) -> None:
    found = dict(argument_faults(SCHEDULES[name], args))
    assert found.keys() == faults.keys()
    assert all(text in found[key] for key, text in faults.items()), found


def test_every_schedule_of_deepspeed_has_a_name_here() -> None:
    from deepspeed.runtime.lr_schedules import VALID_LR_SCHEDULES

    assert [schedule_name(name) for name in VALID_LR_SCHEDULES if schedule_name(name) is None] == []
