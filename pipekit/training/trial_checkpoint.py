"""Checkpoints of a trial: the engines that it saves, each in pipekit's format, and the state of its training."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pipekit.checkpoint.manifest import (
    CONFIG_FILE,
    TrainingState,
    checkpoint_name,
    find_whole,
    resolve_checkpoint,
)
from pipekit.checkpoint.publish import begin_checkpoint, hidden_folder, publish_checkpoint, write_manifest
from pipekit.checkpoint.reader import CheckpointReader
from pipekit.checkpoint.retention import Retention
from pipekit.distributed.processes import run_together
from pipekit.engine.open_checkpoint import open_checkpoint
from pipekit.engine.save import PendingCheckpoint
from pipekit.errors import CheckpointError
from pipekit.files import late_limit_s, wait_until_seen
from pipekit.settings.yaml_source import write_yaml
from pipekit.storage import storing
from pipekit.training.context import TrialContext
from pipekit.training.trial import Trial
from pipekit.training.trial_callbacks import Callbacks


@dataclass(frozen=True)
class TrialState:
    """Where a training stands, beside the state of its engines.

    Attributes:
        trial: name of the trial's class.
        batch: batches trained.
        micro_batches: micro-batches of data that all replicas have read.
        best: best value of the metric by which checkpoints are compared.
        metrics: metrics of the last batch, those of its validation as `val_*`.
    """

    trial: str
    batch: int = 0
    micro_batches: int = 0
    best: float | None = None
    metrics: dict[str, float] | None = None


def save_trial(
    trial: Trial, callbacks: Callbacks, state: TrialState, folder: Path, *, num_samples: int, retention: Retention
) -> PendingCheckpoint:
    """Write a checkpoint of a trial into `folder`, whole when this returns. Every rank calls this together.

    Args:
        trial: what saves its engines.
        callbacks: whose states are saved along.
        state: where the training stands.
        folder: folder of the checkpoints, which every rank sees.
        num_samples: samples trained on.
        retention: the checkpoints of `folder` that are kept.

    Raises:
        PipekitError: on every rank, if something could not be written; nothing is left behind.
    """
    context: TrialContext = trial.context
    is_first = context.distributed.rank == 0
    final = folder / checkpoint_name(state.batch)
    temporary = hidden_folder(final)
    record: dict[str, Any] = {}
    callbacks.call("on_checkpoint_save_start", record)
    training = TrainingState(
        step=state.batch,
        consumed_samples=num_samples,
        seed=context.config.seed,
        lr=0.0,
        optimizer={},
        metrics=state.metrics or {},
        client_state={"trial": asdict(state), "checkpoint": record},
        callbacks=callbacks.state_dict(),
    )

    def finish() -> None:
        config = write_yaml(context.get_experiment_config()).encode()
        write_manifest(final, training, {CONFIG_FILE: config}, tensors={}, tensor_bytes={})

    def write() -> None:
        try:
            run_together(lambda: json.dumps(record))
            run_together(_writing, lambda: begin_checkpoint(final), temporary, is_first)
            run_together(_saving, trial, temporary)
            run_together(_writing, finish, temporary, is_first)
            callbacks.call("on_checkpoint_write_end", str(temporary))
            run_together(_writing, lambda: publish_checkpoint(final, retention=retention), final, is_first)
        except Exception:
            if is_first:
                shutil.rmtree(temporary, ignore_errors=True)
            raise

    return PendingCheckpoint(final, write, in_background=False)


def _saving(trial: Trial, path: Path) -> None:
    with storing(path):
        wait_until_seen({path: None})  # which rank 0 has made
        trial.save(trial.context, path)


def _writing(write: Callable[[], None], path: Path, is_first: bool) -> None:
    if is_first:
        with storing(path):
            write()


def find_checkpoint(latest_checkpoint: str | Path | None, folder: Path) -> tuple[Path | None, str]:
    """The checkpoint that a training goes on from, or None where it begins anew, and a warning if a newer is damaged.

    Args:
        latest_checkpoint: the path of a checkpoint or of a run, "never" for none, or None for the newest in `folder`
            that is whole.
        folder: folder of the run's checkpoints.

    Raises:
        CheckpointError: if there is none at a path, or none in the folder is whole.
    """
    if latest_checkpoint == "never":
        return None, ""
    if latest_checkpoint is None:
        found = find_whole(folder)
        return (None, "") if found is None else (found[0], found[2])
    return resolve_checkpoint(Path(latest_checkpoint)), ""


def load_trial_state(trial: Trial, callbacks: Callbacks, checkpoint: Path) -> TrialState:
    """Load a checkpoint into a trial's engines and callbacks, and return where the training stands.

    Every rank calls this together.

    Args:
        trial: what loads its engines.
        callbacks: whose states are loaded.
        checkpoint: the checkpoint's folder.

    Raises:
        CheckpointError: on every rank, if it was written by another trial, or is damaged.
    """
    limit_s = late_limit_s(trial.context.config.run.timeout_s)
    reader = open_checkpoint(checkpoint.parent, lambda: checkpoint, limit_s=limit_s)
    assert reader is not None
    training = _training_of(reader)
    state = TrialState(**training.client_state["trial"])
    name = type(trial).__qualname__
    if state.trial != name:
        raise CheckpointError(
            f"{checkpoint}: is of the trial {state.trial}, and this is {name}; go on with the trial that wrote it, "
            "or start anew with another run.dir"
        )
    callbacks.call("on_checkpoint_load_start", dict(training.client_state["checkpoint"]))
    run_together(trial.load, trial.context, checkpoint)
    callbacks.load_state_dict(training.callbacks)
    return state


def _training_of(reader: CheckpointReader) -> TrainingState:
    training = reader.manifest.training
    if not {"trial", "checkpoint"} <= training.client_state.keys():
        raise CheckpointError(
            f"{reader.path}: is no checkpoint of a Trial; load it into an engine with engine.load_checkpoint, or give "
            "another run.dir"
        )
    return training
