"""Overview of a run's checkpoints: their steps, losses, sizes and faults."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from pipekit.checkpoint.manifest import (
    CHECKPOINTS_FOLDER,
    MANIFEST_FILE,
    Manifest,
    find_file_fault,
    find_latest,
    list_checkpoints,
    load_manifest,
    read_manifest,
)
from pipekit.checkpoint.reader import CheckpointReader
from pipekit.errors import CheckpointError, StorageError


@dataclass(frozen=True)
class CheckpointSummary:
    """Summary of one checkpoint of a run.

    Attributes:
        path: folder of the checkpoint.
        is_latest: whether the run would resume from it.
        faults: faults of the checkpoint, each with the name of a file; empty if it is intact.
        manifest: its manifest; None if it cannot be read.
        num_bytes: total size of its files.
        is_partial: whether each host keeps a part of the checkpoint, so that files missing here are on other hosts.
    """

    path: Path
    is_latest: bool
    faults: tuple[str, ...]
    manifest: Manifest | None
    num_bytes: int
    is_partial: bool = False


def checkpoints_folder(run: Path) -> Path:
    """Folder of a run's checkpoints, given this folder or the run's.

    Raises:
        CheckpointError: if there are no checkpoints.
    """
    for folder in (run / CHECKPOINTS_FOLDER, run):
        if list_checkpoints(folder):
            return folder
    raise CheckpointError(f"{run}: holds no checkpoint; give the folder of a run")


def find_checkpoint(folder: Path, name: str) -> Path:
    """Find a checkpoint by its step, its name in `folder`, or its path.

    Raises:
        CheckpointError: if there is none.
    """
    for path in (folder / (f"step-{int(name):08d}" if name.isdecimal() else name), Path(name)):
        if (path / MANIFEST_FILE).is_file():
            return path
    names = ", ".join(path.name for path in list_checkpoints(folder))
    raise CheckpointError(f"{name}: no such checkpoint in {folder}; give a step, a path, or one of {names}")


def summarize_checkpoints(folder: Path, *, verify: bool = False) -> list[CheckpointSummary]:
    """Summaries of the checkpoints in a folder, oldest first; `verify` reads all bytes and checks all checksums."""
    try:
        latest = find_latest(folder)
    except CheckpointError:
        latest = None
    return [
        _summarize(path, is_latest=path == latest, verify=verify)
        for path in sorted(path.parent for path in folder.glob(f"*/{MANIFEST_FILE}"))
        if not path.name.startswith(".")
    ]


def _summarize(path: Path, *, is_latest: bool, verify: bool) -> CheckpointSummary:
    manifest: Manifest | None = None
    faults: tuple[str, ...] = ()
    is_partial = False
    try:
        manifest = load_manifest(path)
        faults = tuple(find_faults(path)) if verify else ()
    except CheckpointError as error:
        faults = (str(error).partition("; go on from")[0],)
        with suppress(CheckpointError, StorageError):
            stored = read_manifest(path)
            held = [name for name in stored.file_bytes if (path / name).exists()]
            is_partial = "hosts" in stored.written_by and len(held) < len(stored.file_bytes)
            is_partial = is_partial and not any(find_file_fault(path, stored, name) for name in held)
            manifest = stored if is_partial else None
    num_bytes = sum(file.lstat().st_size for file in path.iterdir())
    return CheckpointSummary(path, is_latest, faults, manifest, num_bytes, is_partial)


def find_faults(path: Path) -> list[str]:
    """Faults of a checkpoint's tensors, found by their checksums; each names the file and the tensor.

    Raises:
        CheckpointError: if the manifest cannot be read, or a file is missing or has another size.
    """
    reader = CheckpointReader(path)
    faults = []
    for name, entry in reader.manifest.tensors.items():
        for kind in entry.files:
            try:
                reader.verify(name, kind)
            except CheckpointError as error:
                faults.append(str(error))
    return faults
