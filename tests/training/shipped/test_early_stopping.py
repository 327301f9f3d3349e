"""Early stopping: when it asks for the end, and what a resumed training remembers."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from gloo_workers import GlooWorkers
from pipekit.config.callbacks_config import EarlyStoppingConfig
from pipekit.errors import ConfigError
from pipekit.training.context import TrialContext
from pipekit.training.periods import Batch
from pipekit.training.shipped.early_stopping import EarlyStopping
from trial_jobs import PointsTrial, fit, make_trial


def stops_after(values: list[float], **settings: Any) -> int | None:
    """Number of validations with these values after which the training is to end."""
    asked: list[bool] = []
    context: Any = SimpleNamespace(
        set_stop_requested=lambda: asked.append(True), distributed=SimpleNamespace(rank=0), terminal=io.StringIO()
    )
    callback = EarlyStopping(context, EarlyStoppingConfig(**settings))
    for number, value in enumerate(values, start=1):
        callback.on_validation_end({"loss": value, "accuracy": -value})
        if asked:
            assert "early stopping: " in context.terminal.getvalue()
            return number
    return None


@pytest.mark.parametrize(
    ("values", "settings", "expected"),
    [
        ([5.0, 4.0, 4.0, 4.5, 3.0], {"patience": 2}, 4),
        ([5.0, 4.0, 4.0, 3.9, 3.9], {"patience": 2}, None),
        ([5.0, 4.0, 3.95, 3.92], {"patience": 2, "min_delta": 0.1}, 4),
        # Small steps add up: each is compared with the best before them.
        ([5.0, 4.95, 4.89, 4.85, 4.7], {"patience": 2, "min_delta": 0.1}, None),
        ([1.0, 2.0, 1.5], {"best_is": "highest", "patience": 1}, 3),
        ([2.0, 1.0, 1.5], {"metric": "accuracy", "best_is": "highest", "patience": 1}, 3),
        ([float("nan"), 1.0, 0.5], {"patience": 2}, None),
        ([1.0, float("nan"), float("nan")], {"patience": 2}, 3),
    ],
)
def test_it_ends_after_validations_without_a_better_value(
    values: list[float], settings: dict[str, Any], expected: int | None
) -> None:
    assert stops_after(values, **settings) == expected


def test_a_metric_that_the_validation_does_not_return_is_named() -> None:
    with pytest.raises(ConfigError, match=r"metric=los: the validation returns loss, accuracy; give one of them"):
        stops_after([1.0], metric="los")


class Scripted(PointsTrial):
    """Evaluates to given errors, one after the other."""

    ERRORS = (5.0, 4.0, 4.1, 4.05, 3.0, 2.0, 1.0)

    def __init__(self, context: TrialContext) -> None:
        super().__init__(context)
        self.settings = EarlyStoppingConfig(patience=context.get_hparam("patience"))

    def evaluate_batch(self, dataloader_iter: Iterator[Any] | None, batch_idx: int) -> dict[str, Any]:
        assert dataloader_iter is not None
        next(dataloader_iter)
        return {"error": self.ERRORS[self.num_batches - 1]}

    def build_callbacks(self) -> dict[str, Any]:
        return {"early_stopping": EarlyStopping(self.context, self.settings)}


def stop_early(rank: int, folder: str) -> list[int]:
    ends = []
    # Patience 1 ends with the first that is worse; 2 goes on from there, with the best and the count of the checkpoint.
    for patience in (1, 2):
        trial = make_trial(folder, Scripted, accumulation=1, patience=patience)
        result = fit(trial, max_length=Batch(7), validation_period=Batch(1), checkpoint_policy="none")
        assert result.checkpoint.name == f"step-{result.batch:08d}"
        assert f'"step": {result.batch}, "loss"' in trial.context.folder.metrics.read_text()
        ends.append(result.batch)
        trial.engine.destroy()
    return ends


@pytest.mark.distributed
@pytest.mark.parametrize("dp", [1, 2])
def test_the_training_ends_with_the_validation_that_showed_it(gloo: GlooWorkers, tmp_path: Path, dp: int) -> None:
    assert gloo.run(dp, stop_early, str(tmp_path)) == [[3, 4]] * dp
