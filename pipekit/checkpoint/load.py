"""Reading a checkpoint into a running engine, whatever layout wrote it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pipekit.checkpoint.manifest import TrainingState
from pipekit.checkpoint.reader import CheckpointReader
from pipekit.engine.distributed import raise_together
from pipekit.engine.engine import PipelineEngine
from pipekit.errors import CheckpointError


def load_checkpoint(
    engine: PipelineEngine, reader: CheckpointReader, *, optimizer_states: bool = True
) -> TrainingState:
    """Set the engine's weights, fp32 masters, optimizer states and counters, and return where training stands.

    Each rank reads the tensors of its own stage, and no others. Every rank calls this together.

    Args:
        engine: what to set.
        reader: the checkpoint.
        optimizer_states: False where the optimizer is of another kind now; its states then begin anew.

    Raises:
        CheckpointError: on every rank, if the checkpoint does not fit the model; nothing has been changed then.
    """
    training = reader.manifest.training
    try:
        _check_fit(engine, reader)
        error = None
    except CheckpointError as failure:
        error = failure
    raise_together(error)

    view = engine.view
    states: list[str] = list(training.optimizer.get("states", [])) if optimizer_states else []
    view.prepare_states(states, int(training.optimizer.get("step", 0)))
    trainable: list[tuple[str, nn.Parameter]] = []
    for name, parameter, _ in engine.module.named_logical_parameters():
        if parameter.requires_grad:
            trainable.append((name, parameter))
        else:
            _copy(parameter, reader.tensor(name))
    view.load_masters((parameter, _on(parameter, reader.tensor(name))) for name, parameter in trainable)
    for state in states:
        for name, parameter in trainable:
            view.load_state(parameter, state, _on(parameter, reader.tensor(name, state)))
    for name, buffer, _ in engine.module.named_logical_buffers():
        _copy(buffer, reader.tensor(name))

    engine.global_steps = training.step
    engine.global_samples = training.consumed_samples
    view.load_loss_scaler_state(training.loss_scaler)
    return training


def _check_fit(engine: PipelineEngine, reader: CheckpointReader) -> None:
    entries = reader.manifest.tensors
    ours: dict[str, tuple[int, ...]] = {}
    for name, parameter, _ in engine.module.named_logical_parameters():
        ours[name] = tuple(parameter.shape)
    for name, buffer, _ in engine.module.named_logical_buffers():
        ours[name] = tuple(buffer.shape)
    faults = []
    for name, shape in ours.items():
        if name not in entries:
            faults.append(f"{name} is not in it")
        elif entries[name].shape != shape:
            faults.append(f"{name} is {entries[name].shape} in it and {shape} in the model")
    if faults:
        shown = "; ".join(faults[:3]) + (f"; and {len(faults) - 3} more" if len(faults) > 3 else "")
        raise CheckpointError(
            f"{reader.path}: belongs to another model: {shown}; use the model section of its config.yaml, or start a "
            "new run with another run.dir"
        )


def _on(parameter: nn.Parameter, value: Tensor) -> Tensor:
    return value.to(parameter.device)


def _copy(target: Tensor, value: Tensor) -> None:
    with torch.no_grad():
        target.copy_(value)
