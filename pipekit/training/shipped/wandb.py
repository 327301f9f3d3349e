"""Weights & Biases: all metrics of a trial, online if an account is logged in."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pipekit.config.callbacks_config import WandbConfig
from pipekit.training.loggers import WandbLogger
from pipekit.training.shipped.shipped_callback import ShippedCallback

if TYPE_CHECKING:
    from pipekit.training.context import TrialContext


class Wandb(ShippedCallback, WandbLogger):
    """Callback that logs all metrics by batch, from the first rank.

    Args:
        context: context of the trial.
        settings: the project, and whether to log online.
    """

    def __init__(self, context: TrialContext, settings: WandbConfig | None = None) -> None:
        ShippedCallback.__init__(self, context)
        WandbLogger.__init__(self, settings or WandbConfig(), context.folder, context.get_experiment_config())

    def on_trial_startup(self, first_batch_idx: int, checkpoint_uuid: str | None) -> None:
        if self.is_first:
            super().on_trial_startup(first_batch_idx, checkpoint_uuid)
