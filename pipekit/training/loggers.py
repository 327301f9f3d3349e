"""Experiment trackers: Weights & Biases, TensorBoard."""

from __future__ import annotations

from typing import Any

from pipekit.config import WandbConfig
from pipekit.errors import ConfigError
from pipekit.plan.plan import Plan
from pipekit.plan.run_folder import RunFolder
from pipekit.training.callbacks import Callback, RunResult, StepMetrics


class WandbLogger(Callback):
    """Logs to Weights & Biases: online where an account is logged in, otherwise into the run folder.

    Args:
        config: the project, and whether to go online.
    """

    def __init__(self, config: WandbConfig) -> None:
        self._config = config
        self._run: Any = None

    def on_train_start(self, plan: Plan, folder: RunFolder, start_step: int) -> None:
        import wandb

        mode: Any = self._config.mode
        if mode == "auto":
            mode = "online" if wandb.api.api_key else "offline"
        self._run = wandb.init(
            project=self._config.project,
            entity=self._config.entity,
            name=self._config.name or folder.path.name,
            dir=str(folder.path),
            mode=mode,
            config=plan.config.model_dump(mode="json"),
            settings=wandb.Settings(silent=True, console="off"),
        )

    def on_step_end(self, metrics: StepMetrics) -> None:
        record = metrics.as_record()
        self._run.log(record, step=int(record.pop("step")))

    def on_train_end(self, result: RunResult) -> None:
        self._run.summary["checkpoint"] = str(result.checkpoint)

    def close(self) -> None:
        if self._run is not None:
            self._run.finish()


class TensorBoardLogger(Callback):
    """Writes TensorBoard event files into the run folder."""

    def __init__(self) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise ConfigError(
                "logging.tensorboard=true: tensorboard is not installed; run pip install 'pipekit[tensorboard]', or "
                "set it to false"
            ) from None
        self._writer_type = SummaryWriter
        self._writer: Any = None

    def on_train_start(self, plan: Plan, folder: RunFolder, start_step: int) -> None:
        self._writer = self._writer_type(str(folder.tensorboard), purge_step=start_step + 1)

    def on_step_end(self, metrics: StepMetrics) -> None:
        record = metrics.as_record()
        step = int(record.pop("step"))
        for name, value in record.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
