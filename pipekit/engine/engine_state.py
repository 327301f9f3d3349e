"""Checkpoints of an engine that is used without a `Trainer`, in a training loop of the user's own."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipekit.checkpoint.manifest import LATEST_FILE, MANIFEST_FILE, TrainingState, find_latest
from pipekit.checkpoint.model_config import files_beside, stored_sections
from pipekit.distributed.processes import raise_together
from pipekit.engine.base_engine import BaseEngine
from pipekit.engine.load import load_checkpoint
from pipekit.engine.open_checkpoint import open_checkpoint
from pipekit.engine.save import save_checkpoint
from pipekit.errors import CheckpointError

_USERS, _SCHEDULERS, _GROUPS = "client_state", "lr_scheduler", "param_groups"


def save_engine(
    engine: BaseEngine,
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
        CheckpointError: on every rank, if something could not be written, or cannot be written as JSON.
    """
    view, scheduler = engine.view, engine.lr_scheduler
    state: dict[str, Any] = {}
    states: list[str] = []
    error = None
    try:
        if name is not None and (Path(name).name != name or name in ("", "..", LATEST_FILE)):
            raise CheckpointError(f"tag={name!r} cannot be the name of a checkpoint; try a word such as 'best'")
        state[_USERS] = _as_json(dict(client_state), "client_state")
        state[_SCHEDULERS] = _as_json(scheduler.state_dict(), "lr_scheduler") if scheduler is not None else None
        if engine.mpu.layout.pp == 1:
            # With a pipeline, groups may be others on every stage.
            state[_GROUPS] = [_numbers_of(group) for group in view.param_groups]
        states = view.state_names()
    except CheckpointError as failure:
        error = failure
    raise_together(error)
    training = TrainingState(
        step=engine.global_steps,
        consumed_samples=engine.global_samples,
        seed=engine.logical.seed,
        lr=float(view.param_groups[0]["lr"]) if view.param_groups else 0.0,
        optimizer={
            "type": type(view.torch_optimizer).__name__.lower() if view.param_groups else "none",
            "step": view.step_count(),
            "states": states,
        },
        loss_scaler=view.loss_scaler_state(),
        client_state=state,
    )
    described = engine.model_config
    config = {**engine.logical.description(), "deepspeed": engine.config, **stored_sections(described)}
    saved = save_checkpoint(
        engine,
        folder,
        training=training,
        config_yaml=json.dumps(config, indent=2, default=str) + "\n",  # JSON is YAML too
        extra_files=files_beside(described),
        name=name,
        update_latest=update_latest,
    )
    return saved.wait()


def _as_json(value: Any, what: str) -> Any:
    try:
        return json.loads(json.dumps(value))
    except (TypeError, ValueError) as error:
        raise CheckpointError(
            f"{what} cannot be written as JSON: {error}; keep numbers, texts, lists and dicts in it"
        ) from None


def _numbers_of(group: Mapping[str, Any]) -> dict[str, Any]:
    """Numbers of a parameter group, and tuples of them, which a scheduler may have changed."""
    numbers: dict[str, Any] = {}
    for key, value in group.items():
        if isinstance(value, Tensor) and value.ndim == 0:
            numbers[key] = value.item()
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            numbers[key] = value
        elif isinstance(value, tuple) and all(isinstance(each, (int, float)) for each in value):
            numbers[key] = list(value)
    return numbers


def load_engine(
    engine: BaseEngine, folder: Path, *, name: str | None, optimizer_states: bool, scheduler_state: bool
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
        CheckpointError: on every rank, if the checkpoint is damaged, or belongs to another model.
        StorageError: on every rank, if one does not see it.
    """
    reader = open_checkpoint(folder, lambda: _find(folder, name))
    if reader is None:
        return None, None
    training = load_checkpoint(engine, reader, optimizer_states=optimizer_states)
    state, groups = training.client_state, engine.view.param_groups
    stored_groups = state.get(_GROUPS) or []
    if optimizer_states and engine.mpu.layout.pp == 1 and len(stored_groups) == len(groups):
        for group, stored in zip(groups, stored_groups, strict=True):
            _set_numbers(group, stored)
    scheduler = state.get(_SCHEDULERS)
    if scheduler_state and scheduler is not None and engine.lr_scheduler is not None:
        engine.lr_scheduler.load_state_dict(_with_keys_of(engine.lr_scheduler.state_dict(), scheduler))
    return str(reader.path), dict(state.get(_USERS, {}))


def _find(folder: Path, name: str | None) -> Path | None:
    path = folder / name if name is not None else find_latest(folder)
    return path if path is not None and (path / MANIFEST_FILE).is_file() else None


def _set_numbers(group: dict[str, Any], stored: Mapping[str, Any]) -> None:
    for key, value in stored.items():
        if isinstance(group.get(key), Tensor):
            with torch.no_grad():
                group[key].fill_(value)
        elif key in group:
            group[key] = tuple(value) if isinstance(value, list) else value


def _with_keys_of(like: Any, stored: Any) -> Any:
    """Return a state that was stored as JSON, with numbers as keys again wherever the state `like` has numbers."""
    if not isinstance(like, dict) or not isinstance(stored, dict):
        return stored
    if like and all(isinstance(key, int) for key in like):
        return type(like)({int(key): value for key, value in stored.items()})
    return {key: _with_keys_of(like.get(key), value) for key, value in stored.items()}
