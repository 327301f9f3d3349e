"""Checkpoints of an engine that is used without a `Trainer`, in a training loop of the user's own."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipekit.checkpoint.manifest import MANIFEST_FILE, TrainingState, find_latest
from pipekit.checkpoint.reader import CheckpointReader
from pipekit.engine.load import load_checkpoint
from pipekit.engine.save import save_checkpoint
from pipekit.engine.training_engine import TrainingEngine
from pipekit.errors import CheckpointError

_USERS, _SCHEDULERS = "client_state", "lr_scheduler"


def save_engine(
    engine: TrainingEngine,
    folder: Path,
    *,
    name: str | None,
    client_state: Mapping[str, Any],
    update_latest: bool = True,
) -> Path:
    """Write the engine's weights, optimizer states and counters into `folder`, and return the checkpoint's path.

    Args:
        engine: the engine to save.
        folder: folder of the checkpoints.
        name: name of the checkpoint; made from the step unless given.
        client_state: further values to keep.
        update_latest: whether `latest` names it from now on.

    Raises:
        CheckpointError: if something could not be written, or cannot be written as JSON.
    """
    view, scheduler = engine.view, engine.lr_scheduler
    state = {_USERS: dict(client_state), _SCHEDULERS: scheduler.state_dict() if scheduler is not None else None}
    try:
        state = json.loads(json.dumps(state))
    except TypeError as error:
        raise CheckpointError(
            f"client_state cannot be written as JSON: {error}; keep numbers, texts, lists and dicts in it"
        ) from None
    kind = type(view.torch_optimizer).__name__.lower()
    training = TrainingState(
        step=engine.global_steps,
        consumed_samples=engine.global_samples,
        seed=engine.module.seed,
        lr=float(view.param_groups[0]["lr"]),
        optimizer={"type": kind, "step": view.step_count(), "states": view.state_names()},
        loss_scaler=view.loss_scaler_state(),
        client_state=state,
    )
    layers = [
        {"name": layer_name, "type": spec.type_name}
        for layer_name, spec in zip(engine.module.layer_names, engine.module.layer_specs, strict=True)
    ]
    # JSON is YAML too.
    config = json.dumps({"layers": layers, "deepspeed": engine.config}, indent=2, default=str) + "\n"
    saved = save_checkpoint(
        engine, folder, training=training, config_yaml=config, name=name, update_latest=update_latest
    )
    return saved.wait()


def load_engine(
    engine: TrainingEngine, folder: Path, *, name: str | None, optimizer_states: bool, scheduler_state: bool
) -> tuple[str | None, dict[str, Any] | None]:
    """Load a checkpoint into the engine, and return its path and the client's state.

    Args:
        engine: the engine to load into.
        folder: folder of the checkpoints.
        name: name of the checkpoint; the newest unless given.
        optimizer_states: whether to read the optimizer's states.
        scheduler_state: whether to read the learning-rate scheduler's.

    Returns:
        None and None where the folder holds no checkpoint.

    Raises:
        CheckpointError: if the checkpoint is damaged, or belongs to another model.
    """
    path = folder / name if name is not None else find_latest(folder)
    if path is None or not (path / MANIFEST_FILE).is_file():
        return None, None
    training = load_checkpoint(engine, CheckpointReader(path), optimizer_states=optimizer_states)
    stored = training.client_state.get(_SCHEDULERS)
    if scheduler_state and stored is not None and engine.lr_scheduler is not None:
        engine.lr_scheduler.load_state_dict(stored)
    return str(path), dict(training.client_state.get(_USERS, {}))
