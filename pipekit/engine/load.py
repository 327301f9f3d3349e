"""Reading a checkpoint into a running engine, whatever layout wrote it."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from itertools import accumulate
from pathlib import Path

import torch
from torch import Tensor, nn

from pipekit.checkpoint.manifest import WEIGHTS, TrainingState
from pipekit.checkpoint.reader import CheckpointReader
from pipekit.distributed.processes import raise_together
from pipekit.engine.base_engine import BaseEngine
from pipekit.engine.tensor_group import logical_shape
from pipekit.errors import CheckpointError
from pipekit.inference.hugging_face import HuggingFaceFolder
from pipekit.tensor_parallel import shard_of


def load_checkpoint(
    engine: BaseEngine,
    reader: CheckpointReader,
    *,
    optimizer_states: bool = True,
    without_states: Collection[str] = (),
) -> TrainingState:
    """Load the engine's weights, fp32 masters, optimizer states and counters, and return the state of the training.

    Each rank reads the tensors of its own stage, and only its own part of those that tensor-parallel ranks share out.
    Before that, the ranks of a stage check the tensors' checksums, each those of some. Every rank calls this together.

    Args:
        engine: the engine to load into.
        reader: the checkpoint.
        optimizer_states: False where the optimizer is of another kind now; its states then begin anew.
        without_states: names of states that are left out.

    Raises:
        DamagedCheckpointError: on every rank, if a tensor is not as it was written; then nothing has been changed.
        CheckpointError: on every rank, if the checkpoint does not fit the model; then nothing has been changed.
    """
    training = reader.manifest.training
    stored = training.optimizer.get("states", []) if optimizer_states else []
    states = [state for state in stored if state not in without_states]
    try:
        _check_fit(engine, reader)
        _verify_share(engine, reader, states)
        error = None
    except CheckpointError as failure:
        error = failure
    raise_together(error)

    view = engine.view
    view.prepare_states(states, int(training.optimizer.get("step", 0)))
    trainable: list[tuple[str, nn.Parameter]] = []
    for name, parameter, _ in engine.logical.named_logical_parameters():
        if view.updates(parameter):
            trainable.append((name, parameter))
        else:
            view.load_frozen(parameter, _read(reader, name, parameter))
    view.load_masters((parameter, _read(reader, name, parameter)) for name, parameter in trainable)
    entries = reader.manifest.tensors
    for state in states:
        for name, parameter in trainable:
            # What was frozen there has none, and begins with zeros.
            if entries[name].trainable:
                view.load_state(parameter, state, _read(reader, name, parameter, state))
    for name, buffer, _ in engine.logical.named_logical_buffers():
        _copy(buffer, reader.tensor(name, is_verified=True))

    engine.global_steps = training.step
    engine.global_samples = training.consumed_samples
    view.load_loss_scaler_state(training.loss_scaler)
    return training


def load_initial_weights(engine: BaseEngine, source: HuggingFaceFolder) -> None:
    """Set the engine's weights to those of a model of Hugging Face. Every rank calls this together.

    Each rank reads the tensors of its own stage one at a time, and only its own slices of them.

    Raises:
        CheckpointError: on every rank, if the weights do not fit the model; then nothing has been changed.
    """
    error = None
    try:
        shapes = source.shapes
        _check_shapes(engine, shapes, where=source.path)
    except CheckpointError as failure:
        error = failure
    raise_together(error)

    def read(name: str, parameter: nn.Parameter) -> Tensor:
        return source.tensor(name, shard=shard_of(parameter)).to(parameter.device, torch.float32)

    named = [(name, parameter) for name, parameter, _ in engine.logical.named_logical_parameters()]
    for name, parameter in named:
        if not engine.view.updates(parameter):
            engine.view.load_frozen(parameter, read(name, parameter))
    engine.view.load_masters(
        (parameter, read(name, parameter)) for name, parameter in named if engine.view.updates(parameter)
    )


def _check_fit(engine: BaseEngine, reader: CheckpointReader) -> None:
    entries = reader.manifest.tensors
    _check_shapes(engine, {name: entry.shape for name, entry in entries.items()}, where=reader.path)


def _check_shapes(engine: BaseEngine, stored: Mapping[str, tuple[int, ...]], *, where: Path) -> None:
    """Check stored shapes of logical tensors against those of this rank; a CheckpointError if they do not fit."""
    ours: dict[str, tuple[int, ...]] = {}
    for name, parameter, _ in engine.logical.named_logical_parameters():
        ours[name] = logical_shape(parameter)
    for name, buffer, _ in engine.logical.named_logical_buffers():
        ours[name] = tuple(buffer.shape)
    faults = []
    for name, shape in ours.items():
        if name not in stored:
            faults.append(f"{name} is not in it")
        elif stored[name] != shape:
            faults.append(f"{name} is {stored[name]} in it and {shape} in the model")
    if faults:
        shown = "; ".join(faults[:3]) + (f"; and {len(faults) - 3} more" if len(faults) > 3 else "")
        raise CheckpointError(
            f"{where}: belongs to another model: {shown}; use the model section of its config.yaml, or start a "
            "new run with another run.dir"
        )


def _verify_share(engine: BaseEngine, reader: CheckpointReader, states: list[str]) -> None:
    """Check this rank's share of the checksums of its stage's tensors, in the order of the files: disks prefer it."""
    entries = reader.manifest.tensors
    needed = [(name, WEIGHTS) for name, _, _ in engine.logical.named_logical_buffers()]
    for name, parameter, _ in engine.logical.named_logical_parameters():
        has_states = engine.view.updates(parameter) and entries[name].trainable
        needed += [(name, kind) for kind in (WEIGHTS, *(states if has_states else ()))]
    needed.sort(key=lambda tensor: reader.place(*tensor))
    sizes = [end - begin for _, begin, end in (reader.place(*tensor) for tensor in needed)]
    mpu = engine.mpu
    place = mpu.data_parallel_rank * mpu.layout.tp + mpu.coordinate.tensor
    share = sum(sizes) // (mpu.layout.dp * mpu.layout.tp) + 1
    for (name, kind), before in zip(needed, accumulate(sizes, initial=0), strict=False):
        if before // share == place:
            reader.verify(name, kind)


def _read(reader: CheckpointReader, name: str, parameter: nn.Parameter, kind: str = WEIGHTS) -> Tensor:
    return reader.tensor(name, kind, shard=shard_of(parameter), is_verified=True).to(parameter.device)


def _copy(target: Tensor, value: Tensor) -> None:
    with torch.no_grad():
        target.copy_(value)
