"""Learning-rate range test: losses of a run whose rate rises by a factor at each step, and the rate they suggest."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pipekit.config import Config
from pipekit.errors import ConfigError
from pipekit.plan.run_folder import read_records

FEWEST_STEPS = 20
_SMOOTHING, _DIVERGED, _FACTOR_BELOW_MINIMUM = 0.9, 4.0, 10.0

RULE = (
    "the rate at which the smoothed loss falls most steeply over the logarithm of the rate, and at most a tenth of the "
    "rate at which it is lowest"
)
"""Rule of the suggestion.

Source: Smith, Cyclical Learning Rates for Training Neural Networks, section 3.3, for the test; `lr_find` of fastai for
the two marks.
"""


@dataclass(frozen=True)
class RangeTest:
    """Result of a range test.

    Attributes:
        rates: learning rate of each step.
        losses: loss before each update.
        smoothed: exponential averages of the losses, corrected for their start; up to where they have diverged.
        steepest: index of the step at which they fall most steeply.
        lowest: index of the step at which they are lowest.
        suggestion: the learning rate, in two digits.
    """

    rates: tuple[float, ...]
    losses: tuple[float, ...]
    smoothed: tuple[float, ...]
    steepest: int
    lowest: int
    suggestion: float


def range_test_config(config: Config, *, lowest: float, highest: float, steps: int) -> Config:
    """Return the configuration of a range test of a run, in the folder `lr-range` of the run's.

    Args:
        config: of the run.
        lowest: learning rate of the first step.
        highest: that of the last.
        steps: number of steps.

    Raises:
        ConfigError: if the range is empty, or has too few steps.
    """
    if not 0 < lowest < highest:
        raise ConfigError(f"--from {lowest:g} must be greater than 0 and less than --to {highest:g}")
    if steps < FEWEST_STEPS:
        raise ConfigError(
            f"--steps {steps} is too few for a smooth curve; try --steps 100, and at least {FEWEST_STEPS}"
        )
    return config.updated(
        {
            "run.dir": str(Path(config.run.dir) / "lr-range"),
            "train.steps": steps,
            "train.eval_interval": None,
            "train.on_spike": "warn",
            "optimizer.lr": highest,
            "scheduler.type": "exponential",
            "scheduler.args": {"min_lr": lowest, "rise_steps": steps - 1},
            **dict.fromkeys(("scheduler.warmup_tokens", "scheduler.decay_tokens", "scheduler.decay_steps")),
            "scheduler.warmup_steps": 0,
            "scheduler.min_lr_ratio": 0.1,
            "checkpoint.resume": "never",
            "checkpoint.interval": None,
            "checkpoint.keep_best": None,
            "callbacks.early_stopping": None,
            "callbacks.lm_eval": None,
        }
    )


def read_range_test(metrics: Path) -> RangeTest:
    """Return the result of a range test from its `metrics.jsonl`.

    Raises:
        ConfigError: if the losses never fall.
    """
    records: list[dict[str, Any]] = [record for _, record in read_records(metrics) if "lr" in record]
    return judge_range_test([each["lr"] for each in records], [each["loss"] for each in records])


def judge_range_test(rates: Sequence[float], losses: Sequence[float]) -> RangeTest:
    """Return the result of a range test.

    Args:
        rates: learning rate of each step, rising.
        losses: loss before each update; those from the first that is not finite on are left out.

    Raises:
        ConfigError: if there are too few, or they never fall.

    Example:
        >>> rates = [1e-6 * 10 ** (step / 20) for step in range(121)]
        >>> losses = [3 - 2 / (1 + (1e-3 / rate) ** 2) + (rate / 0.1) ** 2 for rate in rates]
        >>> judge_range_test(rates, losses).suggestion
        0.0018
    """
    finite = next((index for index, loss in enumerate(losses) if not math.isfinite(loss)), len(losses))
    smoothed, average = list[float](), 0.0
    for index, loss in enumerate(losses[:finite]):
        average = _SMOOTHING * average + (1 - _SMOOTHING) * loss
        smoothed.append(average / (1 - _SMOOTHING ** (index + 1)))
        if smoothed[-1] > _DIVERGED * min(smoothed) > 0:
            break
    if len(smoothed) < FEWEST_STEPS // 2:
        raise ConfigError(
            f"the losses have diverged after {len(smoothed)} steps, too few to choose from; try a lower --from"
        )
    lowest = int(np.argmin(smoothed))
    if lowest == 0 or smoothed[0] - smoothed[lowest] <= 0.01 * abs(smoothed[0]):
        raise ConfigError("the loss hardly falls in the whole range of rates; try a higher --to, or more --steps")
    slopes = np.gradient(np.asarray(smoothed[: lowest + 1]), np.log(rates[: lowest + 1]))
    steepest = int(np.argmin(slopes))
    suggestion = min(rates[steepest], rates[lowest] / _FACTOR_BELOW_MINIMUM)
    return RangeTest(tuple(rates), tuple(losses), tuple(smoothed), steepest, lowest, float(f"{suggestion:.1e}"))


def table_rows(result: RangeTest, *, num_rows: int = 12) -> list[tuple[str, str, str, str]]:
    """Rows of a table of rates and losses: some of the steps, and the two that the suggestion is made from."""
    last = len(result.smoothed) - 1
    shown = {round(index * last / (num_rows - 1)) for index in range(num_rows)} | {result.steepest, result.lowest}
    marks = {result.steepest: "falls most steeply", result.lowest: "lowest"}
    if len(result.smoothed) < len(result.losses):
        marks.setdefault(last, "diverged")
    return [
        (
            f"{result.rates[index]:.2e}",
            f"{result.losses[index]:.4f}",
            f"{result.smoothed[index]:.4f}",
            marks.get(index, ""),
        )
        for index in sorted(shown)
    ]


def draw_range_test(path: Path, result: RangeTest) -> None:
    """Draw losses over learning rates, with matplotlib, and the suggestion among them."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5))
    axes = figure.add_subplot()
    length = len(result.smoothed)
    axes.plot(result.rates[:length], result.losses[:length], color="0.75", label="loss")
    axes.plot(result.rates[:length], result.smoothed, label="smoothed")
    axes.axvline(result.suggestion, color="C2", linestyle="--", label=f"suggestion: {result.suggestion:g}")
    for index, name in ((result.steepest, "steepest descent"), (result.lowest, "lowest")):
        axes.plot(result.rates[index], result.smoothed[index], "o", label=name)
    axes.set(
        xscale="log",
        xlabel="learning rate",
        ylabel="loss",
        ylim=(None, max(result.smoothed[: result.lowest + 1]) * 1.1),
    )
    axes.legend()
    figure.savefig(path, dpi=120, bbox_inches="tight")
