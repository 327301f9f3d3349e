"""The range test: its configuration, the two marks of a curve whose shape is known, and the picture."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from pipekit.config import Config, parse_config
from pipekit.errors import ConfigError
from pipekit.optimizers.learning_rates import SCHEDULES
from pipekit.tune.lr_range import draw_range_test, judge_range_test, range_test_config, read_range_test, table_rows

RATES = [1e-6 * 10 ** (step / 20) for step in range(121)]


def curve(rate: float) -> float:
    """Falls along a logistic curve around 1e-3, as seen over the logarithm of the rate, and rises from 0.1 on."""
    return 3 - 2 / (1 + (1e-3 / rate) ** 2) + (rate / 0.1) ** 2


def config_of(*overrides: str) -> Config:
    return parse_config({"model": {"preset": "tiny"}, "train": {"steps": 300}}, overrides)


def test_the_suggestion_is_near_the_steepest_descent_of_the_curve() -> None:
    result = judge_range_test(RATES, [curve(rate) for rate in RATES])
    slopes = np.gradient([curve(rate) for rate in RATES], np.log(RATES))
    true_steepest, true_lowest = (RATES[int(np.argmin(each))] for each in (slopes, [curve(rate) for rate in RATES]))
    # The average comes after the losses, by some steps of 12% each.
    assert true_steepest <= RATES[result.steepest] <= 3 * true_steepest
    assert true_lowest <= RATES[result.lowest] <= 5 * true_lowest
    assert result.suggestion == pytest.approx(min(RATES[result.steepest], RATES[result.lowest] / 10), rel=0.05)


def test_a_minimum_right_after_the_descent_keeps_the_suggestion_a_tenth_below_it() -> None:
    losses = [3.0 - 0.01 * step if step < 80 else 2.0 + 2.0 ** (step - 80) for step in range(121)]
    result = judge_range_test(RATES, losses)
    assert result.suggestion <= RATES[result.lowest] / 10 * 1.05
    assert len(result.smoothed) < len(losses), "what comes after the divergence does not count"


def test_losses_that_are_not_finite_end_the_curve() -> None:
    losses = [curve(rate) if rate < 0.1 else math.nan for rate in RATES]
    assert len(judge_range_test(RATES, losses).smoothed) == sum(rate < 0.1 for rate in RATES)


@pytest.mark.parametrize(
    ("losses", "message"),
    [
        ([3.0] * 121, "the loss hardly falls in the whole range of rates; try a higher --to"),
        ([3.0 + step for step in range(121)], "hardly falls"),
        ([3.0, 2.0, math.nan] + [1.0] * 118, "diverged after 2 steps, too few to choose from; try a lower --from"),
    ],
)
def test_a_curve_without_a_descent_says_what_to_try(losses: list[float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        judge_range_test(RATES, losses)


def test_the_run_of_a_range_test_rises_from_the_lowest_to_the_highest_rate() -> None:
    config = config_of("optimizer.type=lion", "scheduler.type=wsd", "scheduler.warmup_tokens=4096", "parallel.pp=2")
    test = range_test_config(config, lowest=1e-6, highest=0.1, steps=50)
    rate, _ = SCHEDULES[test.scheduler.type].bind(peak=test.optimizer.lr, section={}, args=test.scheduler.args)
    assert [rate(0), rate(49)] == pytest.approx([1e-6, 0.1])
    assert (test.train.steps, test.checkpoint.resume, test.run.dir) == (50, "never", f"{config.run.dir}/lr-range")
    assert (test.optimizer.type, test.parallel) == ("lion", config.parallel)


@pytest.mark.parametrize(
    ("lowest", "highest", "steps", "message"),
    [
        (1e-3, 1e-4, 100, "--from 0.001 must be greater than 0 and less than --to 0.0001"),
        (0.0, 1.0, 100, "--from 0 must be greater than 0"),
        (1e-6, 1.0, 5, "--steps 5 is too few"),
    ],
)
def test_an_empty_range_is_refused(lowest: float, highest: float, steps: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        range_test_config(config_of(), lowest=lowest, highest=highest, steps=steps)


def test_a_table_and_a_picture_are_made_of_the_metrics_of_a_run(tmp_path: Path) -> None:
    lines = [{"step": step, "lr": rate, "loss": curve(rate)} for step, rate in enumerate(RATES, start=1)]
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    result = read_range_test(metrics)
    assert result == judge_range_test(RATES, [curve(rate) for rate in RATES])
    rows = table_rows(result)
    assert [row[3] for row in rows if row[3]] == ["falls most steeply", "lowest", "diverged"]
    assert [float(row[0]) for row in rows] == sorted(float(row[0]) for row in rows)
    draw_range_test(tmp_path / "range.png", result)
    assert (tmp_path / "range.png").read_bytes().startswith(b"\x89PNG")
