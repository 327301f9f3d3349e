"""Reading a checkpoint into a running engine, whatever layout wrote it."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from itertools import accumulate
from pathlib import Path

import torch
from torch import Tensor, nn

from pipekit.checkpoint.manifest import WEIGHTS, TrainingState
from pipekit.checkpoint.reader import CheckpointReader
from pipekit.deepspeed.optimizer_view import ParameterStates
from pipekit.distributed.processes import raise_together
from pipekit.engine.base_engine import BaseEngine
from pipekit.engine.tensor_group import logical_shape
from pipekit.errors import CheckpointError
from pipekit.inference.base_weights import BaseWeights
from pipekit.inference.peft_adapter import AdapterFolder
from pipekit.layers.lora import is_adapter
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
    Of a checkpoint of adapters these are all parameters that are read; their base is to be loaded before.
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
    entries = reader.manifest.tensors
    stored = training.optimizer.get("states", []) if optimizer_states else []
    states = {
        name: [kind for kind in entry.files if kind in stored and kind not in without_states]
        for name, entry in entries.items()
    }
    try:
        _check_shapes(engine, reader.shapes, where=reader.path, base=not training.base)
        _verify_share(engine, reader, states)
        error = None
    except CheckpointError as failure:
        error = failure
    raise_together(error)

    view = engine.view
    trainable: list[tuple[str, nn.Parameter]] = []
    for name, parameter in _held_parameters(engine, reader):
        if view.updates(parameter):
            trainable.append((name, parameter))
        else:
            view.load_frozen(parameter, _read(reader, name, parameter))
    # What was frozen there has none, and begins with zeros where all others have the same.
    common = set[str]().union(*states.values()).intersection(*filter(None, states.values()))
    if any(entry.numbers for entry in entries.values()):
        common = set()
    prepared = {
        parameter: ParameterStates(states[name] or sorted(common), entries[name].numbers)
        for name, parameter in trainable
    }
    view.prepare_states(prepared, int(training.optimizer.get("step", 0)))
    view.load_masters((parameter, _read(reader, name, parameter)) for name, parameter in trainable)
    # In the order of the files.
    for state in sorted({state for kinds in states.values() for state in kinds}):
        for name, parameter in trainable:
            if state in states[name]:
                view.load_state(parameter, state, _read(reader, name, parameter, state))
    for name, buffer, _ in engine.logical.named_logical_buffers():
        _copy(buffer, reader.tensor(name, is_verified=True))

    engine.global_steps = training.step
    engine.global_samples = training.consumed_samples
    view.load_loss_scaler_state(training.loss_scaler)
    return training


def load_initial_weights(engine: BaseEngine, source: BaseWeights) -> None:
    """Set the engine's weights to those of a model, but for adapters. Every rank calls this together.

    Each rank reads the tensors of its own stage one at a time, and of a model of Hugging Face only its own slices.

    Raises:
        CheckpointError: on every rank, if the weights do not fit the model; then nothing has been changed.
    """
    error = None
    try:
        _check_shapes(engine, source.shapes, where=source.path, adapters=False)
    except CheckpointError as failure:
        error = failure
    raise_together(error)

    def read(name: str, parameter: nn.Parameter) -> Tensor:
        return source.tensor(name, shard=shard_of(parameter)).to(parameter.device, torch.float32)

    named = [(name, each) for name, each, _ in engine.logical.named_logical_parameters() if not is_adapter(name)]
    for name, parameter in named:
        if not engine.view.updates(parameter):
            engine.view.load_frozen(parameter, read(name, parameter))
    engine.view.load_masters(
        (parameter, read(name, parameter)) for name, parameter in named if engine.view.updates(parameter)
    )
    for name, buffer, _ in engine.logical.named_logical_buffers():
        _copy(buffer, source.tensor(name))


def load_initial_adapters(engine: BaseEngine, source: AdapterFolder) -> None:
    """Set the engine's adapters to those of a folder in the format of `peft`. Every rank calls this together."""

    def read(name: str, parameter: nn.Parameter) -> Tensor:
        whole, shard = source.tensor(name), shard_of(parameter)
        return (whole if shard is None else shard.take(whole)).to(parameter.device, torch.float32)

    named = [(name, each) for name, each, _ in engine.logical.named_logical_parameters() if is_adapter(name)]
    engine.view.load_masters((parameter, read(name, parameter)) for name, parameter in named)


def _held_parameters(engine: BaseEngine, reader: CheckpointReader) -> list[tuple[str, nn.Parameter]]:
    """Parameters of this rank that a checkpoint holds: all of them, or those of adapters."""
    alone = bool(reader.manifest.training.base)
    named = engine.logical.named_logical_parameters()
    return [(name, parameter) for name, parameter, _ in named if is_adapter(name) or not alone]


def _check_shapes(
    engine: BaseEngine, stored: Mapping[str, tuple[int, ...]], *, where: Path, base: bool = True, adapters: bool = True
) -> None:
    """Check stored shapes of logical tensors against those of this rank; a CheckpointError if they do not fit.

    `base` and `adapters` say which parameters are to be among them.
    """
    ours: dict[str, tuple[int, ...]] = {}
    for name, parameter, _ in engine.logical.named_logical_parameters():
        if adapters if is_adapter(name) else base:
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


def _verify_share(engine: BaseEngine, reader: CheckpointReader, states: Mapping[str, Sequence[str]]) -> None:
    """Check this rank's share of the checksums of its stage's tensors, in the order of the files: disks prefer it."""
    needed = [(name, WEIGHTS) for name, _, _ in engine.logical.named_logical_buffers()]
    for name, parameter in _held_parameters(engine, reader):
        needed += [(name, kind) for kind in (WEIGHTS, *(states[name] if engine.view.updates(parameter) else ()))]
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
