"""Metrics of steps of a run of layers, which may still be on their way from the device when the next step begins."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from pipekit.engine.late_number import LateNumber
from pipekit.engine.stopwatch import Moment
from pipekit.training.context import TrialContext
from pipekit.training.numbers_watch import NumbersWatch
from pipekit.training.reducers import Reducer
from pipekit.training.run_totals import StepTotals
from pipekit.training.trial_metrics import TrialMetrics


@dataclass(frozen=True)
class LaunchedStep:
    """A step whose results may still be on their way from the device."""

    lr: float
    num_tokens: int
    loss: LateNumber
    grad_norm: LateNumber
    started: Moment
    ended: Moment
    waited_s: float
    totals: StepTotals
    others: Mapping[str, float]

    @property
    def has_ended(self) -> bool:
        """True if `read` need not wait."""
        return self.loss.is_here and self.grad_norm.is_here

    def read(self) -> dict[str, float]:
        """Return the step's metrics.

        They are the mean loss over the global batch, before the update; the learning rate of the update; the 2-norm of
        the whole gradient before clipping, infinite where the update was skipped; the step's speed and wall time, and
        how long this rank has waited for data, in seconds and as a fraction of it; totals of the run, and the
        operations per second; the samples of each source of a mixture so far; and a rank that is slow, where one has
        just been found.
        """
        step_time_s = self.ended.since(self.started)
        return {
            "loss": self.loss.read(),
            "lr": self.lr,
            "grad_norm": self.grad_norm.read(),
            "tokens_per_s": self.num_tokens / step_time_s,
            "step_time_s": step_time_s,
            "data_wait": min(1.0, self.waited_s / step_time_s),
            "data_wait_s": self.waited_s,
            **self.totals.metrics(step_time_s),
            **self.others,
        }


class LateMetrics(TrialMetrics):
    """Metrics of steps, the same on every rank, the last of which may still be on their way from the device.

    Args:
        context: the run's.
        watch: tells of steps that were skipped.
        facts: returns what is known by now beside a step.
    """

    gathers = False

    def __init__(self, context: TrialContext, watch: NumbersWatch, facts: Callable[[], dict[str, float]]) -> None:
        super().__init__(context, "train_batch", Reducer.AVG, for_training=True)
        self._watch, self._facts = watch, facts
        self._launched: deque[LaunchedStep] = deque()

    @property
    def are_here(self) -> bool:
        # From the first skipped step on, each is read at once, so that the run ends with the step that is named.
        return self._launched[0].has_ended or self._watch.num_skipped > 0

    def update(self, metrics: Any, num_samples: int) -> None:
        self._launched.append(metrics)

    def report(self) -> tuple[dict[str, Any], list[dict[str, float]]]:
        metrics = {**self._launched.popleft().read(), **self._facts()}
        return metrics, [metrics]
