"""Format of a checkpoint: a folder of safetensors files, and a manifest that lists their tensors.

A checkpoint holds logical tensors under logical names and knows nothing of the layout that wrote it:

    step-00000100/
        manifest.json                   tensors, optimizer, data position, seeds, file sizes, checksums
        config.yaml                     the resolved configuration
        tokenizer.json                  where the model was trained on text
        weights-0000.safetensors        fp32 weights by logical name, one file a writer
        exp_avg-0000.safetensors        optimizer states by the same names

The folder is written under another name, and renamed when it is complete; the file `latest` beside it is written last.
The manifest has checksums of all tensors, of every other file, and of itself. No name in it leads out of the folder.
"""

from __future__ import annotations

import json
import stat
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Annotated, Any

import xxhash
from pydantic import AfterValidator, Field, NonNegativeInt, TypeAdapter, ValidationError

from pipekit.data.mixture import MixtureState
from pipekit.errors import CheckpointError, DamagedCheckpointError, StorageError
from pipekit.storage import storing

FORMAT = "pipekit-checkpoint"
VERSION = 2
MANIFEST_FILE = "manifest.json"
CONFIG_FILE = "config.yaml"
TOKENIZER_FILE = "tokenizer.json"
LATEST_FILE = "latest"
CHECKPOINTS_FOLDER = "checkpoints"
WEIGHTS = "weights"
EMA = "ema"
"""Kind of an exponential moving average of the weights."""

FileName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]*$")]
"""Name of a file in the checkpoint's folder; it must not be a path, which could lead elsewhere."""


Checksum = xxhash.xxh3_128
"""Checksum of bytes in pieces: `update` adds a piece, and `hexdigest` returns the same as `checksum` of all bytes."""


def checksum(data: Any) -> str:
    """Checksum of bytes or any buffer: XXH3 of 128 bits, in hexadecimal.

    Example:
        >>> checksum(b"")
        '99aa06d3014798d86001c324468d497f'
    """
    return xxhash.xxh3_128_hexdigest(data)


def file_checksum(path: Path) -> str:
    """Checksum of a file of any size; it is read in pieces."""
    value = Checksum()
    with path.open("rb") as stream:
        while piece := stream.read(2**20):
            value.update(piece)
    return value.hexdigest()


@dataclass(frozen=True)
class TensorEntry:
    """One logical tensor.

    Attributes:
        shape: shape of the whole tensor.
        dtype: number format of the weights (`float32`); optimizer states are fp32.
        files: for each kind (`weights`, `exp_avg`, ...), the file that holds the tensor under its logical name.
        trainable: False for buffers and frozen parameters.
        checksums: for each kind, the checksum of the tensor's bytes.
        numbers: optimizer states that are one number for the whole tensor, by name.
    """

    shape: tuple[NonNegativeInt, ...]
    dtype: str
    files: Mapping[str, FileName]
    trainable: bool = True
    checksums: Mapping[str, str] = field(default_factory=dict)
    numbers: Mapping[str, float] = field(default_factory=dict)


def _check_optimizer(record: Mapping[str, Any]) -> Mapping[str, Any]:
    for key, kind in {"type": str, "step": int, "states": list}.items():
        if type(record.get(key, kind())) is not kind:
            raise ValueError(f"{key} must be {kind.__name__}")
    return record


@dataclass(frozen=True)
class TrainingState:
    """Training progress, which does not depend on the layout.

    Attributes:
        step: number of optimizer steps so far.
        consumed_samples: position in the data: samples read so far, over all epochs.
        seed: seed of initial weights, dropout and data order. All random numbers are seeded by this seed, the step, the
            micro-batch and the layer, so the seed and the step are the whole state of the generators.
        lr: learning rate of the last step.
        optimizer: class name, number of updates, and names of the states.
        loss_scaler: state of fp16's dynamic loss scale; empty for other precisions.
        data_fingerprint: identifies the tokenized data that `consumed_samples` counts.
        mixture: distribution of `consumed_samples` over several sources; None if there is one source.
        metrics: the latest metrics, for information.
        client_state: values that a user's training loop saved with the checkpoint.
        callbacks: states of callbacks, by name.
        base: path and fingerprint of the weights that adapters are added to, which the checkpoint does not hold; empty
            if it holds the whole model.
    """

    step: NonNegativeInt
    consumed_samples: NonNegativeInt
    seed: int
    lr: float
    optimizer: Annotated[Mapping[str, Any], AfterValidator(_check_optimizer)]
    loss_scaler: Mapping[str, float] = field(default_factory=dict)
    data_fingerprint: str = ""
    mixture: MixtureState | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    client_state: Mapping[str, Any] = field(default_factory=dict)
    callbacks: Mapping[str, Any] = field(default_factory=dict)
    base: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Manifest:
    """Manifest: the table of contents of a checkpoint.

    Attributes:
        training: training progress.
        tensors: tensors by logical name.
        file_bytes: sizes of all files except the manifest.
        file_checksums: checksums of the files that hold no tensors.
        written_by: versions of the software, and the layout.
    """

    training: TrainingState
    tensors: Mapping[str, TensorEntry]
    file_bytes: Mapping[FileName, NonNegativeInt]
    written_by: Mapping[str, str] = field(default_factory=dict)
    file_checksums: Mapping[FileName, str] = field(default_factory=dict)

    def to_json(self) -> str:
        """Return the manifest's JSON text, with the checksum of its content."""
        content = {"format": FORMAT, "version": VERSION, **asdict(self)}
        return json.dumps({**content, "checksum": _content_checksum(content)}, indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str, *, where: str) -> Manifest:
        """Parse a manifest's JSON text.

        Raises:
            DamagedCheckpointError: if `text` is not a manifest, or has changed since it was written.
            CheckpointError: if the manifest has another version.
        """
        try:
            stored = json.loads(text)
            if not isinstance(stored, dict):
                raise ValueError("no JSON object")
            if stored.get("format") != FORMAT:
                raise DamagedCheckpointError(f"{where}: not a pipekit checkpoint (format is {stored.get('format')!r})")
            if stored.get("version") != VERSION:
                rule = f"this pipekit reads version {VERSION}; use the pipekit that wrote it, or a newer one"
                raise CheckpointError(f"{where}: written as version {stored.get('version')!r}, and {rule}")
            manifest = _adapter().validate_json(text, strict=True)
            if stored.pop("checksum", None) != _content_checksum(stored):
                raise ValueError("its content does not match its checksum")
        except ValidationError as error:
            first = error.errors(include_url=False, include_context=False)[0]
            place = ".".join(map(str, first["loc"]))
            reason = f"{place}: {first['msg']}, and is {str(first['input'])[:80]!r}"
            raise DamagedCheckpointError(f"{where}: cut short or damaged ({reason})") from None
        except (ValueError, RecursionError) as error:
            raise DamagedCheckpointError(f"{where}: cut short or damaged ({error})") from None
        return manifest


def _content_checksum(content: Mapping[str, Any]) -> str:
    return checksum(json.dumps(content, sort_keys=True).encode())


@cache
def _adapter() -> TypeAdapter[Manifest]:
    return TypeAdapter(Manifest)


def checkpoint_name(step: int) -> str:
    """Return the folder name of the checkpoint after `step` steps.

    Example:
        >>> checkpoint_name(100)
        'step-00000100'
    """
    return f"step-{step:08d}"


def list_checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints in a `checkpoints` folder, oldest first, except those that are still being written."""
    return sorted(path for path in folder.glob("step-*") if _is_checkpoint(path))


def earlier_checkpoints(checkpoint: Path) -> list[Path]:
    """Checkpoints with fewer steps in the same folder, newest first."""
    return [path for path in reversed(list_checkpoints(checkpoint.parent)) if path.name < checkpoint.name]


def find_latest(folder: Path) -> Path | None:
    """Return the newest checkpoint, which a `checkpoints` folder's `latest` file names; None if there is none.

    Raises:
        DamagedCheckpointError: if `latest` names a checkpoint that does not exist.
    """
    latest = folder / LATEST_FILE
    if not latest.exists():
        checkpoints = list_checkpoints(folder)
        return checkpoints[-1] if checkpoints else None
    # A longer file, or one that is no file, holds no name.
    name = latest.read_bytes()[:255].decode(errors="replace").strip() if _is_plain_file(latest) else ""
    if Path(name).name != name or not _is_checkpoint(folder / name):
        raise DamagedCheckpointError(
            f"{latest} names {name!r}, which is not there; {_instead(folder, name) or f'remove {latest} to start anew'}"
        )
    return folder / name


def find_whole(folder: Path) -> tuple[Path, Manifest, str] | None:
    """Find the checkpoint to resume from in a `checkpoints` folder: the newest whose manifest and file sizes are right.

    Returns:
        The checkpoint, its manifest, and a warning if it is not the newest; None if there is no checkpoint.

    Raises:
        CheckpointError: if there are checkpoints, but none is intact.
    """
    fault: DamagedCheckpointError | None = None
    candidates: list[Path] = list_checkpoints(folder)[::-1]
    try:
        newest = find_latest(folder)
        if newest is None:
            return None
        candidates = [newest, *earlier_checkpoints(newest)]
    except DamagedCheckpointError as error:
        fault = error
    for checkpoint in candidates:
        try:
            manifest = load_manifest(checkpoint)
            return checkpoint, manifest, f"{fault}; going on from {checkpoint} instead" if fault else ""
        except DamagedCheckpointError as error:
            fault = fault or error
    assert fault is not None
    raise fault


def resolve_checkpoint(path: Path) -> Path:
    """Return the checkpoint for a path: a checkpoint, a run's folder, or its `checkpoints` folder.

    Raises:
        CheckpointError: if there is none.
    """
    if (path / MANIFEST_FILE).is_file():
        return path
    for folder in (path / CHECKPOINTS_FOLDER, path):
        if folder.is_dir() and (latest := find_latest(folder)) is not None:
            return latest
    if not path.exists():
        raise CheckpointError(f"{path}: no such folder; give a run's folder or one of its checkpoints")
    raise CheckpointError(
        f"{path}: holds no checkpoint; a run writes one at its end and at every checkpoint.interval into "
        f"{path / CHECKPOINTS_FOLDER}"
    )


def load_manifest(checkpoint: Path) -> Manifest:
    """Load a checkpoint's manifest, and check that every file exists, with its size and, without tensors, its checksum.

    Raises:
        DamagedCheckpointError: if a file is missing or damaged; the message names it, and what to use instead.
        CheckpointError: if there is no checkpoint, or it has another version.
    """
    path = checkpoint / MANIFEST_FILE
    if not path.exists():
        raise CheckpointError(f"{checkpoint}: no {MANIFEST_FILE}, so it is not a checkpoint")
    manifest = read_manifest(checkpoint)
    if fault := _find_fault(checkpoint, manifest):
        instead = _instead(checkpoint.parent, checkpoint.name)
        raise DamagedCheckpointError(f"{fault}: the checkpoint is damaged{'; ' + instead if instead else ''}")
    return manifest


def _find_fault(checkpoint: Path, manifest: Manifest) -> str | None:
    for name in manifest.file_bytes:
        if fault := find_file_fault(checkpoint, manifest, name):
            return fault
    for name, entry in manifest.tensors.items():
        for kind, file_name in entry.files.items():
            if file_name not in manifest.file_bytes or kind not in entry.checksums:
                return f"{checkpoint / MANIFEST_FILE}: has no size or no checksum for {kind} of {name!r}"
    return None


def find_file_fault(checkpoint: Path, manifest: Manifest, name: str) -> str | None:
    """Fault of a checkpoint's file, by its size and, if it holds no tensors, by its checksum; None without a fault."""
    file = checkpoint / name
    with storing(file, doing="read"):
        try:
            if not _is_plain_file(file):
                return f"{file}: is no plain file"
            if (found := file.stat().st_size) != (num_bytes := manifest.file_bytes[name]):
                return f"{file}: has {found:,} bytes of {num_bytes:,}"
            expected = manifest.file_checksums.get(name)
            if expected is not None and file_checksum(file) != expected:
                return f"{file}: has changed since it was written"
        except FileNotFoundError:
            if hosts := manifest.written_by.get("hosts"):
                return (
                    f"{file}: is not on this host (parts of this checkpoint are on {hosts}); start the run on those "
                    f"hosts, or copy it with pipekit checkpoints gather {checkpoint.parent.parent} --hostfile HOSTFILE"
                )
            return f"{file}: is missing"
    return None


def _is_plain_file(path: Path) -> bool:
    return stat.S_ISREG(path.lstat().st_mode)


def _is_checkpoint(path: Path) -> bool:
    return not path.is_symlink() and (path / MANIFEST_FILE).is_file()


def read_manifest(checkpoint: Path) -> Manifest:
    """Read and check a checkpoint's manifest, but no other files; `load_manifest` checks those too."""
    path = checkpoint / MANIFEST_FILE
    with storing(path, doing="read"):
        if not _is_plain_file(path):
            raise DamagedCheckpointError(f"{path}: is no plain file")
        # Bytes that are no text make no JSON either.
        return Manifest.from_json(path.read_text(encoding="utf-8", errors="replace"), where=str(path))


def _instead(folder: Path, bad_name: str) -> str:
    for other in reversed(list_checkpoints(folder)):
        with suppress(CheckpointError, StorageError):
            if other.name != bad_name and not _find_fault(other, read_manifest(other)):
                return f"go on from one that is whole with checkpoint.resume={other}"
    return ""
