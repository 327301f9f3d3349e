"""Callbacks: what happens beside training at each of its events. They run on the rank that reports, and on no other."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TextIO

from pipekit.plan.plan import Plan
from pipekit.plan.run_folder import RunFolder, trim_metrics


@dataclass(frozen=True)
class StepMetrics:
    """Metrics of one step.

    Attributes:
        step: number of updates made, this one included; 0 before the first.
        loss: mean over the global batch, before the update.
        lr: learning rate of the update.
        grad_norm: 2-norm of the whole gradient before clipping; infinite where the update was skipped.
        tokens_per_s: tokens of the global batch over the step's time.
        step_time_s: wall time of the step.
        val_loss: mean over the held-out batches, where the step ended with an evaluation.
        extra: the trial's own validation metrics, by name.
    """

    step: int
    loss: float | None = None
    lr: float | None = None
    grad_norm: float | None = None
    tokens_per_s: float | None = None
    step_time_s: float | None = None
    val_loss: float | None = None
    extra: dict[str, float] | None = None

    def as_record(self) -> dict[str, float]:
        """Return the metrics that are known, flat."""
        known = {key: value for key, value in asdict(self).items() if value is not None and key != "extra"}
        return {**known, **(self.extra or {})}


@dataclass(frozen=True)
class RunResult:
    """End of a run: its last step and metrics.

    Attributes:
        step: updates made in all.
        checkpoint: the newest; None where none was written.
        first_val_loss: of the first evaluation in this start of the run.
        last: metrics of the last step.
        time_s: wall time of the training loop.
    """

    step: int
    checkpoint: Path | None
    first_val_loss: float | None
    last: StepMetrics
    time_s: float


class Callback:
    """The events of a run. Override those that matter."""

    def on_train_start(self, plan: Plan, folder: RunFolder, start_step: int) -> None:
        """Training is about to begin, after `start_step` updates of an earlier start."""

    def on_warning(self, message: str) -> None:
        """Something is not as it should be, and the run goes on; also before `on_train_start`."""

    def on_step_end(self, metrics: StepMetrics) -> None:
        """A step has been made and, where it was due, evaluated.

        On a GPU, the next one may have been made by now, weights included, unless a checkpoint follows.
        """

    def on_evaluation_start(self, step: int) -> None:
        """The model is about to be evaluated."""

    def on_checkpoint(self, step: int, path: Path) -> None:
        """A checkpoint has been written."""

    def on_train_end(self, result: RunResult) -> None:
        """Training has ended as planned."""

    def close(self) -> None:
        """Let go of files and connections; called however training ends."""


def json_line(record: Mapping[str, Any]) -> str:
    """Return a line of JSON, in which a number that is not finite, such as a skipped step's gradient norm, is null.

    Example:
        >>> json_line({"step": 1, "grad_norm": float("inf")})
        '{"step": 1, "grad_norm": null}\\n'
    """
    known = {key: value if value == value and abs(value) != float("inf") else None for key, value in record.items()}
    return json.dumps(known) + "\n"


class MetricsFile(Callback):
    """Writes `metrics.jsonl`: one object a line, flushed at once."""

    def __init__(self) -> None:
        self._file: TextIO | None = None

    def on_train_start(self, plan: Plan, folder: RunFolder, start_step: int) -> None:
        trim_metrics(folder.metrics, start_step)
        self._file = folder.metrics.open("a", encoding="utf-8")

    def on_step_end(self, metrics: StepMetrics) -> None:
        assert self._file is not None
        self._file.write(json_line(metrics.as_record()))
        self._file.flush()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
