"""Retention: which checkpoints a run keeps."""

from __future__ import annotations

import math
import shutil
import uuid
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pipekit.checkpoint.manifest import Manifest, find_latest, list_checkpoints, read_manifest
from pipekit.errors import CheckpointError, StorageError


@dataclass(frozen=True)
class Retention:
    """Rule for keeping checkpoints: a checkpoint is kept if any of the attributes below keeps it.

    Attributes:
        newest: number of the newest checkpoints to keep; None keeps all.
        every: keeps checkpoints whose step is a multiple of this number.
        best: metric whose best checkpoint is kept.
        best_is: whether the lowest or the highest value of the metric is the best.
    """

    newest: int | None = None
    every: int | None = None
    best: str | None = None
    best_is: Literal["lowest", "highest"] = "lowest"


def list_surplus(folder: Path, rule: Retention) -> list[Path]:
    """Checkpoints in a folder that a rule does not keep, oldest first.

    The checkpoint that `latest` names is always kept, and so are checkpoints of later steps, which a run that was set
    back does not know, and checkpoints whose manifests cannot be read.
    """
    latest = find_latest(folder)
    if rule.newest is None or latest is None:
        return []
    manifests: dict[Path, Manifest] = {}
    for path in list_checkpoints(folder):
        with suppress(CheckpointError, StorageError):
            manifests[path] = read_manifest(path)
    if latest not in manifests:
        return []
    last_step = manifests[latest].training.step
    until_now = [path for path, manifest in manifests.items() if manifest.training.step <= last_step]
    kept = {latest, *until_now[-rule.newest :]}
    if rule.every is not None:
        kept |= {path for path in until_now if manifests[path].training.step % rule.every == 0}
    if rule.best is not None:
        sign = 1 if rule.best_is == "lowest" else -1
        values = {path: manifests[path].training.metrics.get(rule.best, math.nan) for path in until_now}
        measured = [path for path in until_now if not math.isnan(values[path])]
        kept |= {min(measured, key=lambda path: sign * values[path])} if measured else set()
    return [path for path in until_now if path not in kept]


def remove_checkpoint(path: Path) -> None:
    """Remove a checkpoint; it is no longer listed as soon as the removal begins."""
    hidden = path.with_name(f".{path.name}.{uuid.uuid4().hex}.old")
    path.rename(hidden)
    shutil.rmtree(hidden)


def remove_leftovers(folder: Path) -> None:
    """Remove the leftovers of interrupted saves from a folder of checkpoints."""
    for pattern in (".*.tmp", ".*.old"):
        for path in folder.glob(pattern):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
