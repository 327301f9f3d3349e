"""Opening a checkpoint on all ranks, also from a shared folder that shows late what another machine has written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch.distributed as dist

from pipekit.checkpoint.manifest import MANIFEST_FILE, file_checksum
from pipekit.checkpoint.reader import CheckpointReader
from pipekit.distributed.processes import run_together, tell_object
from pipekit.files import LATE_S, wait_until_seen
from pipekit.storage import storing


def open_checkpoint(
    folder: Path, find: Callable[[], Path | None], *, limit_s: float = LATE_S
) -> CheckpointReader | None:
    """Open the checkpoint that rank 0 finds in a folder, on every rank, once each sees what rank 0 sees.

    Every rank calls this together.

    Args:
        folder: where it lies, as this rank names it.
        find: called on rank 0; None where there is no checkpoint.
        limit_s: the longest wait of a rank for files that others have written.

    Returns:
        None on every rank where rank 0 finds none.

    Raises:
        CheckpointError: on every rank, if it is damaged.
        StorageError: on every rank, if one does not see it.
    """
    mine, seen = run_together(lambda: _open(find() if dist.get_rank() == 0 else None))
    told: tuple[str, dict[str, int], str] | None = tell_object(seen)
    if told is None:
        return None
    name, sizes, checksum = told

    def open_here() -> CheckpointReader:
        manifest = folder / name / MANIFEST_FILE

        def find_fault() -> str | None:
            return None if file_checksum(manifest) == checksum else f"{manifest}: is not as rank 0 reads it"

        wait_until_seen(
            {folder / name / file: size for file, size in sizes.items()}, find_fault=find_fault, limit_s=limit_s
        )
        return CheckpointReader(folder / name)

    return run_together(lambda: mine or open_here())


def _open(path: Path | None) -> tuple[CheckpointReader | None, tuple[str, dict[str, int], str] | None]:
    """Open a checkpoint; return its name, the sizes of its files and the checksum of its manifest besides."""
    if path is None:
        return None, None
    reader, manifest = CheckpointReader(path), path / MANIFEST_FILE
    with storing(manifest, doing="read"):
        sizes = {MANIFEST_FILE: manifest.stat().st_size, **reader.manifest.file_bytes}
        return reader, (path.name, sizes, file_checksum(manifest))
