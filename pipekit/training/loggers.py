"""Loggers: callbacks that write metrics into `metrics.jsonl`, to Weights & Biases, TensorBoard, and the log."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from pipekit.config import WandbConfig
from pipekit.errors import StorageError
from pipekit.line_files import LineFile
from pipekit.plan.run_folder import RunFolder, trim_records
from pipekit.storage import storing
from pipekit.training.trial_callbacks import TrialCallback

if TYPE_CHECKING:
    from pipekit.training.context import TrialContext
    from pipekit.training.trial_loop import TrialResult

_logger = logging.getLogger(__name__)


def json_line(record: Mapping[str, Any]) -> str:
    """Return a line of JSON, in which a number that is not finite, such as a skipped step's gradient norm, is null.

    Example:
        >>> json_line({"step": 1, "grad_norm": float("inf")})
        '{"step": 1, "grad_norm": null}\\n'
    """
    known = {key: value if value == value and abs(value) != float("inf") else None for key, value in record.items()}
    return json.dumps(known) + "\n"


class MetricsFile(TrialCallback):
    """Writes `metrics.jsonl`: one object a line, at once, or once there is room.

    Args:
        folder: the run's files.
        warn: called with a message where lines cannot be written.
    """

    def __init__(self, folder: RunFolder, warn: Callable[[str], None]) -> None:
        self._path, self._warn = folder.metrics, warn
        self._file: LineFile | None = None

    def on_trial_startup(self, first_batch_idx: int, checkpoint_uuid: str | None) -> None:
        trim_records(self._path, first_batch_idx)
        self._file = LineFile(self._path, self._warn)

    def on_rollback(self, batch: int) -> None:
        self.on_trial_shutdown()
        self.on_trial_startup(batch, None)

    def on_metrics(self, step: int, metrics: dict[str, Any]) -> None:
        assert self._file is not None
        self._file.write(json_line({"step": step, **metrics}))

    def on_trial_shutdown(self) -> None:
        if self._file is not None:
            self._file.close()


class TrialLog(TrialCallback):
    """Writes metrics of a trial to the log."""

    def on_metrics(self, step: int, metrics: dict[str, Any]) -> None:
        _logger.info("batch %d: %s", step, ", ".join(f"{name} {value:.6g}" for name, value in metrics.items()))

    def on_warning(self, message: str) -> None:
        _logger.warning(message)


class WandbLogger(TrialCallback):
    """Logs to Weights & Biases: online where an account is logged in, otherwise into the run folder.

    Args:
        config: the project, and whether to go online.
        folder: the run's files.
        settings: the configuration to show there.
    """

    def __init__(self, config: WandbConfig, folder: RunFolder, settings: dict[str, Any]) -> None:
        self._config, self._folder, self._settings = config, folder, settings
        self._run: Any = None

    def on_trial_startup(self, first_batch_idx: int, checkpoint_uuid: str | None) -> None:
        import wandb

        folder = self._folder
        mode: Any = self._config.mode
        if mode == "auto":
            mode = "online" if wandb.api.api_key else "offline"
        folder.path.mkdir(parents=True, exist_ok=True)
        self._run = wandb.init(
            project=self._config.project,
            entity=self._config.entity,
            name=self._config.name or folder.path.absolute().name,
            dir=str(folder.path),
            mode=mode,
            config=self._settings,
            settings=wandb.Settings(silent=True, console="off"),
        )

    def on_metrics(self, step: int, metrics: dict[str, Any]) -> None:
        if self._run is not None:
            self._run.log(metrics, step=step)

    def on_training_end(self, result: TrialResult) -> None:
        if self._run is not None:
            self._run.summary["checkpoint"] = str(result.checkpoint)

    def on_trial_shutdown(self) -> None:
        if self._run is not None:
            self._run.finish()


class TensorBoardLogger(TrialCallback):
    """Writes metrics to TensorBoard, where the training's context asks for it; those without room are lost.

    Args:
        context: the training's.
    """

    def __init__(self, context: TrialContext) -> None:
        self._context = context
        self._has_warned = False

    def on_metrics(self, step: int, metrics: dict[str, Any]) -> None:
        if not self._context.get_enable_tensorboard_logging():
            return
        path = self._context.get_tensorboard_path()
        try:
            with storing(path):
                for name, value in metrics.items():
                    self._context.get_tensorboard_writer().add_scalar(name, value, step)
        except StorageError as error:
            # A writer that has failed once writes nothing more, and the next one begins another file.
            self._context.close()
            if not self._has_warned:
                self._context.warn(f"{error}; training goes on, and TensorBoard lacks metrics from step {step} on")
            self._has_warned = True
