"""Format of a checkpoint: a folder of safetensors files, and a manifest that lists their tensors.

A checkpoint holds logical tensors under logical names and knows nothing of the layout that wrote it:

    step-00000100/
        manifest.json                   tensors, optimizer, data position, seeds, file sizes
        config.yaml                     the resolved configuration
        tokenizer.json                  where the model was trained on text
        weights-0000.safetensors        fp32 weights by logical name, one file a writer
        exp_avg-0000.safetensors        optimizer states by the same names

It is written under another name and renamed when it is whole; the file `latest` beside it is written last.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pipekit.errors import CheckpointError

FORMAT = "pipekit-checkpoint"
VERSION = 1
MANIFEST_FILE = "manifest.json"
CONFIG_FILE = "config.yaml"
TOKENIZER_FILE = "tokenizer.json"
LATEST_FILE = "latest"
CHECKPOINTS_FOLDER = "checkpoints"
WEIGHTS = "weights"


@dataclass(frozen=True)
class TensorEntry:
    """One logical tensor.

    Attributes:
        shape: its whole shape.
        dtype: of the model's weights (`float32`); optimizer states are fp32.
        files: for each kind (`weights`, `exp_avg`, ...) the file that holds it under its logical name.
        trainable: False for buffers and frozen parameters.
    """

    shape: tuple[int, ...]
    dtype: str
    files: Mapping[str, str]
    trainable: bool = True


@dataclass(frozen=True)
class TrainingState:
    """Progress of the training, which does not depend on the layout.

    Attributes:
        step: optimizer steps done.
        consumed_samples: position in the data: samples read so far, over all epochs.
        seed: of initial weights, dropout and data order. Random numbers are drawn from seeds that are folded from it
            with the step, micro-batch and layer, so that it and the step are the whole state of the generators.
        lr: learning rate of the last step.
        optimizer: class name, number of updates, and names of the states.
        loss_scaler: state of fp16's dynamic loss scale; empty otherwise.
        data_fingerprint: identifies the tokenized data that `consumed_samples` counts.
        metrics: the latest metrics, for information.
        client_state: values that a training loop of your own saved with it.
    """

    step: int
    consumed_samples: int
    seed: int
    lr: float
    optimizer: Mapping[str, Any]
    loss_scaler: Mapping[str, float] = field(default_factory=dict)
    data_fingerprint: str = ""
    metrics: Mapping[str, float] = field(default_factory=dict)
    client_state: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Manifest:
    """The table of contents of a checkpoint."""

    training: TrainingState
    tensors: Mapping[str, TensorEntry]
    file_bytes: Mapping[str, int]
    written_by: Mapping[str, str] = field(default_factory=dict)

    def to_json(self) -> str:
        """Return the manifest as it is stored."""
        return json.dumps({"format": FORMAT, "version": VERSION, **asdict(self)}, indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str, *, where: str) -> Manifest:
        """Parse a stored manifest.

        Raises:
            CheckpointError: if `text` is not a manifest, or one of a newer version.
        """
        try:
            stored = json.loads(text)
            if stored.get("format") != FORMAT:
                raise CheckpointError(f"{where}: not a pipekit checkpoint (format is {stored.get('format')!r})")
            if stored["version"] > VERSION:
                rule = f"this pipekit reads up to {VERSION}; upgrade pipekit"
                raise CheckpointError(f"{where}: written as version {stored['version']}, and {rule}")
            tensors = {
                name: TensorEntry(tuple(entry["shape"]), entry["dtype"], entry["files"], entry["trainable"])
                for name, entry in stored["tensors"].items()
            }
            return cls(TrainingState(**stored["training"]), tensors, stored["file_bytes"], stored["written_by"])
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{where}: cut short or damaged ({type(error).__name__}: {error})") from None


def checkpoint_name(step: int) -> str:
    """Return the folder name of the checkpoint after `step` steps.

    Example:
        >>> checkpoint_name(100)
        'step-00000100'
    """
    return f"step-{step:08d}"


def list_checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints in a `checkpoints` folder, oldest first, without any that is still being written."""
    return sorted(path for path in folder.glob("step-*") if (path / MANIFEST_FILE).is_file())


def find_latest(folder: Path) -> Path | None:
    """Return the newest checkpoint that a `checkpoints` folder's `latest` file names; None where there is none.

    Raises:
        CheckpointError: if `latest` names a checkpoint that is not there.
    """
    latest = folder / LATEST_FILE
    if not latest.is_file():
        checkpoints = list_checkpoints(folder)
        return checkpoints[-1] if checkpoints else None
    name = latest.read_text().strip()
    if not (folder / name / MANIFEST_FILE).is_file():
        raise CheckpointError(
            f"{latest} names {name!r}, which is not there; {_instead(folder, name) or f'remove {latest} to start anew'}"
        )
    return folder / name


def resolve_checkpoint(path: Path) -> Path:
    """Return the checkpoint that a user means by `path`: a checkpoint, a run's folder, or its `checkpoints` folder.

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
        f"{path}: holds no checkpoint; a run writes one at its end and every checkpoint.interval steps into "
        f"{path / CHECKPOINTS_FOLDER}"
    )


def load_manifest(checkpoint: Path) -> Manifest:
    """Read a checkpoint's manifest and check that each file is there and whole.

    Raises:
        CheckpointError: if something is missing or cut short; it names the file, both sizes, and what to use instead.
    """
    path = checkpoint / MANIFEST_FILE
    if not path.is_file():
        raise CheckpointError(f"{checkpoint}: no {MANIFEST_FILE}, so it is not a checkpoint")
    manifest = _read_manifest(path)
    if fault := _find_fault(checkpoint, manifest):
        instead = _instead(checkpoint.parent, checkpoint.name)
        raise CheckpointError(f"{fault}: the checkpoint is cut short{'; ' + instead if instead else ''}")
    return manifest


def _find_fault(checkpoint: Path, manifest: Manifest) -> str | None:
    for name, num_bytes in manifest.file_bytes.items():
        file = checkpoint / name
        found = file.stat().st_size if file.is_file() else None
        if found != num_bytes:
            return f"{file}: {'is missing' if found is None else f'has {found:,} bytes of {num_bytes:,}'}"
    return None


def _read_manifest(path: Path) -> Manifest:
    # Bytes that are no text make no JSON either.
    return Manifest.from_json(path.read_text(encoding="utf-8", errors="replace"), where=str(path))


def _instead(folder: Path, bad_name: str) -> str:
    for other in reversed(list_checkpoints(folder)):
        with suppress(CheckpointError, OSError):
            if other.name != bad_name and not _find_fault(other, _read_manifest(other / MANIFEST_FILE)):
                return f"go on from one that is whole with checkpoint.resume={other}"
    return ""
