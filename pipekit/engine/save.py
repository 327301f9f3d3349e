"""Writing a checkpoint: each rank writes its share of the logical tensors, and all of it appears or nothing."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Mapping
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path

import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor

from pipekit.checkpoint.manifest import (
    CONFIG_FILE,
    LATEST_FILE,
    MANIFEST_FILE,
    WEIGHTS,
    Manifest,
    TensorEntry,
    TrainingState,
    checkpoint_name,
    list_checkpoints,
)
from pipekit.distributed.processes import raise_together
from pipekit.engine.tensor_group import join_shards, logical_shape
from pipekit.engine.training_engine import TrainingEngine
from pipekit.errors import CheckpointError
from pipekit.files import replace_folder, write_atomically

# Storage may be slow, and a rank that writes is not heard from by those that wait for it.
_LONGEST_WRITE = timedelta(hours=6)


def save_checkpoint(
    engine: TrainingEngine,
    folder: Path,
    *,
    training: TrainingState,
    config_yaml: str,
    extra_files: Mapping[str, Path] | None = None,
    keep: int | None = None,
    name: str | None = None,
    update_latest: bool = True,
) -> Path:
    """Write a checkpoint into `folder` and return its path. Every rank calls this together.

    The replicas of a stage share its tensors out among themselves, so that all ranks write at once. The folder appears
    under its name when it is complete, and `latest` names it after that.

    Args:
        engine: the engine to save.
        folder: the run's `checkpoints` folder, which every rank sees.
        training: the state of the training.
        config_yaml: the resolved configuration.
        extra_files: files to copy in, by name.
        keep: how many checkpoints to keep in `folder`; None keeps all.
        name: name of the checkpoint; made from the step unless given.
        update_latest: whether `latest` names it from now on.

    Raises:
        CheckpointError: on every rank, if any rank could not write; nothing is left behind.
    """
    name = name or checkpoint_name(training.step)
    final, temporary = folder / name, folder / f".{name}.tmp"
    rank = dist.get_rank()
    if rank == 0:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    everybody = engine.mpu.build_group(
        [range(dist.get_world_size())], "gloo", purpose="checkpoints", timeout=_LONGEST_WRITE
    )
    assert everybody is not None
    control = everybody.process_group
    dist.barrier(control)

    error: Exception | None = None
    entries: dict[str, TensorEntry] = {}
    # Gathering is collective, so that it goes on whether or not this rank can write.
    shares, entries = _gather_share(engine, writer=rank)
    try:
        file_bytes = {file: _write(temporary / file, tensors) for file, tensors in shares.items()}
    except OSError as failure:
        error, file_bytes = CheckpointError(f"{temporary}: could not be written: {failure}"), {}
    try:
        raise_together(error, control)
        written: list[tuple[dict[str, TensorEntry], dict[str, int]]] = [({}, {})] * dist.get_world_size()
        dist.all_gather_object(written, (entries, file_bytes), group=control)
        if rank == 0:
            try:
                _finish(temporary, final, written, training, config_yaml, extra_files or {})
                if update_latest:
                    write_atomically(folder / LATEST_FILE, name + "\n")
                _prune(folder, keep)
            except OSError as failure:
                error = CheckpointError(f"{final}: could not be written: {failure}")
        raise_together(error, control)
    except CheckpointError:
        if rank == 0:
            shutil.rmtree(temporary, ignore_errors=True)
        raise
    return final


def _gather_share(
    engine: TrainingEngine, *, writer: int
) -> tuple[dict[str, dict[str, Tensor]], dict[str, TensorEntry]]:
    """Return the tensors that this rank writes, by file, and their entries.

    Gathers from the stage's other replicas, and joins the parts of its tensor-parallel ranks.
    """
    mpu, view = engine.mpu, engine.view
    states = view.state_names()
    shares: dict[str, dict[str, Tensor]] = {}
    entries: dict[str, TensorEntry] = {}
    tensor_group = engine.module.tensor_group
    load = [0] * (mpu.layout.dp * mpu.layout.tp)
    place = mpu.data_parallel_rank * mpu.layout.tp + mpu.coordinate.tensor

    def put(name: str, tensors: Mapping[str, Tensor], *, trainable: bool) -> None:
        files = {}
        for kind, tensor in tensors.items():
            files[kind] = f"{kind}-{writer:04d}.safetensors"
            shares.setdefault(files[kind], {})[name] = tensor.detach().to("cpu", copy=True).contiguous()
        weights = tensors[WEIGHTS]
        dtype = str(weights.dtype).removeprefix("torch.")
        entries[name] = TensorEntry(tuple(weights.shape), dtype, files, trainable)

    for name, parameter, owned in engine.module.named_logical_parameters():
        # The owner among the stage's ranks is the one with the least to write so far: the same on all of them.
        owner = load.index(min(load))
        mine = owned and owner == place
        if owned:
            load[owner] += math.prod(logical_shape(parameter))
        if not parameter.requires_grad:
            frozen = join_shards(view.full_frozen(parameter), parameter, tensor_group)
            if mine:
                put(name, {WEIGHTS: frozen}, trainable=False)
            continue
        tensors = {WEIGHTS: view.full_master(parameter)}
        tensors |= {state: view.full_state(parameter, state) for state in states}
        tensors = {kind: join_shards(tensor, parameter, tensor_group) for kind, tensor in tensors.items()}
        if mine:
            put(name, tensors, trainable=True)
    for name, buffer, owned in engine.module.named_logical_buffers():
        if owned and place == 0:
            put(name, {WEIGHTS: buffer}, trainable=False)
    return shares, entries


def _write(path: Path, tensors: dict[str, Tensor]) -> int:
    save_file(tensors, path, metadata={"format": "pt"})
    with path.open("rb+") as file:
        os.fsync(file.fileno())
    return path.stat().st_size


def _finish(
    temporary: Path,
    final: Path,
    written: list[tuple[dict[str, TensorEntry], dict[str, int]]],
    training: TrainingState,
    config_yaml: str,
    extra_files: Mapping[str, Path],
) -> None:
    tensors: dict[str, TensorEntry] = {}
    file_bytes: dict[str, int] = {}
    for entries, sizes in written:
        tensors.update(entries)
        file_bytes.update(sizes)
    for name, source in extra_files.items():
        shutil.copyfile(source, temporary / name)
    write_atomically(temporary / CONFIG_FILE, config_yaml)
    versions = {name: version(name) for name in ("pipekit", "torch", "deepspeed")}
    manifest = Manifest(training=training, tensors=tensors, file_bytes=file_bytes, written_by=versions)
    write_atomically(temporary / MANIFEST_FILE, manifest.to_json())
    replace_folder(temporary, final)  # A run that was set back to an earlier step writes this one again.


def _prune(folder: Path, keep: int | None) -> None:
    if keep is None:
        return
    latest = (folder / LATEST_FILE).read_text().strip()
    older = [path for path in list_checkpoints(folder) if path.name != latest]
    for path in older[: max(0, len(older) - (keep - 1))]:
        shutil.rmtree(path)
