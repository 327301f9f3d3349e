"""Loggers: callbacks that write metrics and events to the run folder, to trackers, and to the log."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from pipekit.config import Config, WandbConfig
from pipekit.errors import StorageError
from pipekit.line_files import LineFile, utc_now
from pipekit.plan.plan import Plan
from pipekit.plan.run_folder import RunFolder, trim_records
from pipekit.settings.dotted import dotted_items
from pipekit.storage import storing
from pipekit.training.trial_callbacks import TrialCallback

if TYPE_CHECKING:
    from pipekit.training.context import TrialContext
    from pipekit.training.trial_loop import TrialResult

_logger = logging.getLogger(__name__)


def json_line(record: Mapping[str, Any]) -> str:
    """Return a line of JSON in which numbers that are not finite, such as a skipped step's gradient norm, are null.

    Example:
        >>> json_line({"step": 1, "grad_norm": float("inf")})
        '{"step": 1, "grad_norm": null}\\n'
    """
    known = {key: value if value == value and abs(value) != float("inf") else None for key, value in record.items()}
    return json.dumps(known) + "\n"


class MetricsFile(TrialCallback):
    """Logger that writes `metrics.jsonl`, one object per line; if the disk is full, it writes the lines later.

    Args:
        folder: files of the run.
        warn: called with a message if lines cannot be written.
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


class EventsFile(TrialCallback):
    """Logger that writes `events.jsonl`: a line for each start, checkpoint, warning, rollback, and end.

    Unlike metrics, the events of earlier starts are kept, from whatever step a run resumes.

    Args:
        folder: files of the run.
        warn: called with a message if lines cannot be written.
        about_start: layout and precision of this start, in words.
    """

    def __init__(self, folder: RunFolder, warn: Callable[[str], None], about_start: str) -> None:
        self._path, self._warn, self._about_start = folder.events, warn, about_start
        self._file: LineFile | None = None
        self._step = 0
        self._is_training = False

    def on_trial_startup(self, first_batch_idx: int, checkpoint_uuid: str | None) -> None:
        self._step, self._is_training = first_batch_idx, True
        origin = "" if checkpoint_uuid is None else f"; going on from {checkpoint_uuid}"
        self._note("start", f"{self._about_start}{origin}")

    def on_metrics(self, step: int, metrics: dict[str, Any]) -> None:
        self._step = step

    def on_warning(self, message: str) -> None:
        self._note("warning", message)

    def on_rollback(self, batch: int) -> None:
        self._note("rollback", f"back to step {batch}")
        self._step = batch

    def on_checkpoint_upload_end(self, uuid: str) -> None:
        self._note("checkpoint", uuid)

    def on_training_end(self, result: TrialResult) -> None:
        self._is_training = False
        self._note("end", "")

    def on_trial_shutdown(self) -> None:
        if self._is_training:
            self._note("stop", "")
        if self._file is not None:
            self._file.close()

    def _note(self, event: str, text: str) -> None:
        if self._file is None:
            self._file = LineFile(self._path, self._warn)
        self._file.write(json.dumps({"time": utc_now(), "step": self._step, "event": event, "text": text}) + "\n")


class TrialLog(TrialCallback):
    """Logger that writes the metrics of a trial to the log."""

    def on_metrics(self, step: int, metrics: dict[str, Any]) -> None:
        _logger.info("batch %d: %s", step, ", ".join(f"{name} {value:.6g}" for name, value in metrics.items()))

    def on_warning(self, message: str) -> None:
        _logger.warning(message)


class WandbLogger(TrialCallback):
    """Logger for Weights & Biases: online if an account is logged in, otherwise in the run folder.

    A training that resumes from a checkpoint continues the same run there; the names of its files contain the run's id.

    Args:
        config: the project, and whether to log online.
        folder: files of the run.
        settings: the configuration and the plan to show there.
    """

    def __init__(self, config: WandbConfig, folder: RunFolder, settings: dict[str, Any]) -> None:
        self._config, self._folder, self._settings = config, folder, settings
        self._run: Any = None

    def on_trial_startup(self, first_batch_idx: int, checkpoint_uuid: str | None) -> None:
        run_id = _wandb_id(self._folder) if first_batch_idx else None
        same = {} if run_id is None else {"id": run_id, "resume": "allow"}
        # What a run that goes on has changed, such as its number of steps, takes the place of what it had.
        self._run = _start_wandb(self._config, self._folder, config=self._settings, allow_val_change=True, **same)

    def on_metrics(self, step: int, metrics: dict[str, Any]) -> None:
        if self._run is not None:
            self._run.log(metrics, step=step)

    def on_training_end(self, result: TrialResult) -> None:
        if self._run is not None:
            found = {f"val_{name}": value for name, value in (result.validation_metrics or {}).items()}
            self._run.summary.update(
                {"checkpoint": str(result.checkpoint), "steps": result.batch, "time_s": result.time_s, **found}
            )

    def on_trial_shutdown(self) -> None:
        if self._run is not None:
            self._run.finish()


class TensorBoardLogger(TrialCallback):
    """Logger that writes metrics to TensorBoard if the context asks for it; metrics are lost if the disk is full.

    The configuration becomes the hyperparameters of the run, besides the losses.

    Args:
        context: context of the training.
        settings: the configuration.
    """

    def __init__(self, context: TrialContext, settings: Mapping[str, Any]) -> None:
        self._context, self._settings = context, settings
        self._has_warned = False

    def on_trial_startup(self, first_batch_idx: int, checkpoint_uuid: str | None) -> None:
        self._write(first_batch_idx, self._write_settings)

    def _write_settings(self, writer: Any) -> None:
        from torch.utils.tensorboard.summary import hparams

        measured = dict.fromkeys(("loss", "val_loss"), 0.0)
        experiment, start, _ = hparams(_hyperparameters(self._settings), measured)  # type: ignore[no-untyped-call]
        for summary in (experiment, start):
            writer.file_writer.add_summary(summary)

    def on_metrics(self, step: int, metrics: dict[str, Any]) -> None:
        def write(writer: Any) -> None:
            for name, value in metrics.items():
                writer.add_scalar(name, value, step)

        self._write(step, write)

    def _write(self, step: int, write: Callable[[Any], None]) -> None:
        if not self._context.get_enable_tensorboard_logging():
            return
        try:
            with storing(self._context.get_tensorboard_path()):
                write(self._context.get_tensorboard_writer())
        except StorageError as error:
            # A writer that has failed once writes nothing more, and the next one begins another file.
            self._context.close()
            if not self._has_warned:
                self._context.warn(f"{error}; training goes on, and TensorBoard lacks metrics from step {step} on")
            self._has_warned = True


def plan_facts(plan: Plan) -> dict[str, Any]:
    """Return the decisions of a plan for a tracker: the layout, the stages, and the model's size."""
    layout = plan.layout
    return {
        "pp": layout.pp,
        "dp": layout.dp,
        "tp": layout.tp,
        "processes": layout.world_size,
        "device": plan.device,
        "precision": plan.precision,
        "schedule": plan.schedule.name,
        "num_micro_batches": plan.batch.num_micro_batches,
        "num_parameters": plan.num_parameters,
        "boundaries": list(plan.boundaries),
        "stage_parameters": list(plan.stage_parameters),
    }


def _hyperparameters(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return nested settings by dotted keys, as numbers, switches and texts.

    Example:
        >>> _hyperparameters({"train": {"steps": 3, "ema": None}, "data": {"source": ["a", "b"]}})
        {'train.steps': 3, 'train.ema': 'None', 'data.source': "['a', 'b']"}
    """
    kept = (bool, int, float, str)
    return {key: value if isinstance(value, kept) else str(value) for key, value in dotted_items(settings)}


def log_evaluation(folder: RunFolder, config: Config, record: Mapping[str, Any], metrics: Mapping[str, float]) -> None:
    """Write an evaluation to the folder of its run, and to the run's trackers.

    Trackers show its numbers as `eval/loss` and so on, at the step of the checkpoint.

    Args:
        folder: files of the run.
        config: configuration of the run.
        record: the evaluation, with its `step`; it becomes a line of `evaluations.jsonl`.
        metrics: numbers of the evaluation by name.

    Raises:
        StorageError: if a file cannot be written.
    """
    with storing(folder.evaluations), folder.evaluations.open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")
    step = record["step"]
    shown = {f"eval/{name}": value for name, value in metrics.items()}
    if config.logging.tensorboard:
        from torch.utils.tensorboard import SummaryWriter

        with storing(folder.tensorboard), SummaryWriter(str(folder.tensorboard)) as writer:
            for name, value in shown.items():
                writer.add_scalar(name, value, step)
    if config.logging.trackio is not None:
        from pipekit.training.shipped.trackio import finish_trackio, start_trackio

        run = start_trackio(config.logging.trackio, folder, resume="allow")
        run.log(shown, step=step)
        finish_trackio(run)
    tracked = config.logging.wandb
    if tracked is not None and tracked.mode != "disabled":
        # A run that has ended takes no earlier step of its own, so that the evaluations have an axis of theirs.
        run = _start_wandb(tracked, folder, id=_wandb_id(folder), resume="allow")
        run.define_metric("eval/*", step_metric="eval/step")
        run.log({**shown, "eval/step": step})
        run.finish()


def _start_wandb(wandb_config: WandbConfig, folder: RunFolder, **options: Any) -> Any:
    import wandb

    mode: Any = wandb_config.mode
    if mode == "auto":
        mode = "online" if wandb.api.api_key else "offline"
    folder.path.mkdir(parents=True, exist_ok=True)
    return wandb.init(
        project=wandb_config.project,
        entity=wandb_config.entity,
        name=wandb_config.name or folder.path.absolute().name,
        dir=str(folder.path),
        mode=mode,
        settings=wandb.Settings(silent=True, console="off"),
        **options,
    )


def _wandb_id(folder: RunFolder) -> str | None:
    """Id of the newest Weights & Biases run of a run folder, from the name of its files."""
    found = sorted((folder.path / "wandb").glob("*run-*/run-*.wandb"), key=lambda path: path.stat().st_mtime)
    return found[-1].stem.removeprefix("run-") if found else None
