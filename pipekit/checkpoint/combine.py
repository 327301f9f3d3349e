"""Differences of two checkpoints, and averages of several, one tensor at a time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from pipekit.checkpoint.manifest import (
    MANIFEST_FILE,
    WEIGHTS,
    Manifest,
    TensorEntry,
    checkpoint_name,
)
from pipekit.checkpoint.reader import CheckpointReader
from pipekit.checkpoint.writer import tensor_bytes, write_tensors
from pipekit.errors import CheckpointError
from pipekit.files import building_folder, write_atomically

# An average is written in files of so many bytes at most, or of one tensor.
_FILE_BYTES = 512 * 2**20


@dataclass(frozen=True)
class TensorDifference:
    """Difference of one tensor between two checkpoints.

    Attributes:
        name: logical name.
        kind: `weights`, or the optimizer state.
        largest: largest absolute difference of an element; None if the tensors cannot be compared.
        relative: norm of the difference divided by the norm of the first tensor, infinite if that is 0; None if the
            tensors cannot be compared.
        reason: why they cannot be compared; empty if they can.
    """

    name: str
    kind: str
    largest: float | None
    relative: float | None
    reason: str = ""


def compare_checkpoints(one: Path, other: Path) -> list[TensorDifference]:
    """Tensors that differ between two checkpoints, in the order of the first; all others have the same bits."""
    first, second = CheckpointReader(one), CheckpointReader(other)
    kinds = {
        (name, kind): None
        for reader in (first, second)
        for name, entry in reader.manifest.tensors.items()
        for kind in entry.files
    }
    found = [_compare(first, second, name, kind) for name, kind in kinds]
    return [difference for difference in found if difference is not None]


def _compare(first: CheckpointReader, second: CheckpointReader, name: str, kind: str) -> TensorDifference | None:
    for reader, other in ((first, second), (second, first)):
        entry = reader.manifest.tensors.get(name)
        if entry is None or kind not in entry.files:
            return TensorDifference(name, kind, None, None, f"is in {other.path.name} alone")
    ours, theirs = first.tensor(name, kind), second.tensor(name, kind)
    if ours.shape != theirs.shape:
        return TensorDifference(name, kind, None, None, f"is {tuple(ours.shape)} and {tuple(theirs.shape)}")
    if ours.dtype == theirs.dtype and tensor_bytes(ours) == tensor_bytes(theirs):
        return None
    difference = theirs.double() - ours.double()
    norm = float(ours.double().norm())
    relative = float(difference.norm()) / norm if norm else math.inf
    return TensorDifference(name, kind, float(difference.abs().max()), relative)


def average_checkpoints(checkpoints: Sequence[Path], folder: Path, *, kind: str = WEIGHTS) -> Path:
    """Write a checkpoint with the mean weights of several checkpoints, and return its path; it has no optimizer states.

    Memory use is bounded by 0.5 GB and the largest tensor. Buffers and frozen parameters, the state of the training and
    the other files are those of the last checkpoint.

    Args:
        checkpoints: checkpoints of one model, the newest last.
        folder: folder to write `average-of-<number>-<step>` or `ema-of-<step>` to.
        kind: `weights`, or `ema` to average the moving averages, which become the weights.

    Raises:
        CheckpointError: if a checkpoint is damaged, or they are of different models.
        StorageError: if the result cannot be written; nothing is left behind.
    """
    readers = [CheckpointReader(path) for path in checkpoints]
    last = readers[-1].manifest
    for reader in readers:
        for name, entry in last.tensors.items():
            stored = reader.manifest.tensors.get(name)
            if stored is None or (stored.shape, stored.trainable) != (entry.shape, entry.trainable):
                raise CheckpointError(f"{reader.path}: {name!r} is not as in {checkpoints[-1]}; average one model's")
    what = f"average-of-{len(readers)}" if kind == WEIGHTS else f"{kind}-of"
    final = folder / f"{what}-{checkpoint_name(last.training.step)}"
    with building_folder(final) as temporary:
        entries, file_bytes = _write_average(readers, temporary, kind)
        for name in last.file_checksums:
            write_atomically(temporary / name, (checkpoints[-1] / name).read_bytes())
            file_bytes[name] = last.file_bytes[name]
        title = "average" if kind == WEIGHTS else "moving average"
        steps = [reader.manifest.training.step for reader in readers]
        manifest = Manifest(
            training=replace(last.training, optimizer={**last.training.optimizer, "states": []}),
            tensors=entries,
            file_bytes=file_bytes,
            written_by={**last.written_by, "layout": f"{title} of step {', '.join(map(str, steps))}"},
            file_checksums=last.file_checksums,
        )
        write_atomically(temporary / MANIFEST_FILE, manifest.to_json())
    return final


def _write_average(
    readers: Sequence[CheckpointReader], folder: Path, kind: str
) -> tuple[dict[str, TensorEntry], dict[str, int]]:
    entries: dict[str, TensorEntry] = {}
    file_bytes: dict[str, int] = {}
    waiting: dict[str, Tensor] = {}

    def flush() -> None:
        file = f"{WEIGHTS}-{len(file_bytes):04d}.safetensors"
        checksums = write_tensors(folder / file, waiting)
        for name, value in checksums.items():
            entry = readers[-1].manifest.tensors[name]
            entries[name] = replace(entry, files={WEIGHTS: file}, checksums={WEIGHTS: value})
        file_bytes[file] = (folder / file).stat().st_size
        waiting.clear()

    for name, entry in readers[-1].manifest.tensors.items():
        waiting[name] = _mean(readers, name, kind) if entry.trainable else readers[-1].tensor(name)
        if sum(tensor.nbytes for tensor in waiting.values()) >= _FILE_BYTES:
            flush()
    if waiting:
        flush()
    return entries, file_bytes


def _mean(readers: Sequence[CheckpointReader], name: str, kind: str) -> Tensor:
    total = readers[0].tensor(name, kind).double()
    for reader in readers[1:]:
        total += reader.tensor(name, kind)
    return (total / len(readers)).to(readers[-1].tensor(name, kind).dtype)
