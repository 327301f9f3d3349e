"""Early stopping: the end of a training whose validations no longer improve."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from pipekit.config.callbacks_config import EarlyStoppingConfig
from pipekit.errors import ConfigError
from pipekit.training.shipped.shipped_callback import ShippedCallback

if TYPE_CHECKING:
    from pipekit.training.context import TrialContext
    from pipekit.training.trial import Trial


class EarlyStopping(ShippedCallback):
    """Callback that stops the training after a number of consecutive validations without a better value of a metric.

    The best value and the number of validations since then are saved in checkpoints. A metric that is not a number is
    never better.

    Args:
        context: context of the trial.
        settings: metric, patience and smallest improvement.
    """

    def __init__(self, context: TrialContext, settings: EarlyStoppingConfig | None = None) -> None:
        super().__init__(context)
        self.settings = settings or EarlyStoppingConfig()
        self.best: float | None = None
        self.num_worse = 0

    def check(self, trial: Trial, *, evaluates: bool) -> None:
        if not evaluates:
            raise ConfigError(
                f"callbacks.early_stopping: {type(trial).__name__} has no evaluation; write evaluate_batch and "
                "build_validation_data_loader, or leave early_stopping out"
            )

    def on_validation_end(self, metrics: dict[str, Any]) -> None:
        settings = self.settings
        name = settings.metric or next(iter(metrics))
        if name not in metrics:
            raise ConfigError(
                f"callbacks.early_stopping.metric={name}: the validation returns {', '.join(metrics)}; give one of them"
            )
        value = float(metrics[name])
        sign = 1 if settings.best_is == "lowest" else -1
        is_better = self.best is None or sign * (self.best - value) > settings.min_delta
        if is_better and not math.isnan(value):
            self.best, self.num_worse = value, 0
            return
        self.num_worse += 1
        if self.num_worse >= settings.patience:
            self.context.set_stop_requested()
            if self.is_first:
                best = "a number" if self.best is None else f"better than {self.best:.6g}"
                text = f"early stopping: {name} has not been {best} in {self.num_worse} validations"
                self.context.terminal.write(f"{text}\n")

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best, "num_worse": self.num_worse}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best, self.num_worse = state_dict["best"], state_dict["num_worse"]
