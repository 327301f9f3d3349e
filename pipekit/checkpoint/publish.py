"""Publishing a checkpoint: it is written to a hidden folder, which one rank renames once it is complete."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path

from pipekit.checkpoint.manifest import (
    LATEST_FILE,
    MANIFEST_FILE,
    Manifest,
    TensorEntry,
    TrainingState,
    file_checksum,
)
from pipekit.checkpoint.retention import Retention, list_surplus, remove_checkpoint, remove_leftovers
from pipekit.files import replace_folder, write_atomically


def hidden_folder(final: Path) -> Path:
    """Path of the hidden folder to which a checkpoint is written, the same on every rank."""
    return final.with_name(f".{final.name}.tmp")


def begin_checkpoint(final: Path) -> None:
    """Make the hidden folder of a checkpoint, and remove the leftovers of interrupted saves beside it."""
    remove_leftovers(final.parent)
    hidden_folder(final).mkdir(parents=True)


def write_manifest(
    final: Path,
    training: TrainingState,
    contents: Mapping[str, bytes],
    *,
    tensors: Mapping[str, TensorEntry],
    tensor_bytes: Mapping[str, int],
    layout: str | None = None,
    hosts: Sequence[str] = (),
) -> None:
    """Write files to the hidden folder of a checkpoint, and a manifest of these and of all other files there.

    Args:
        final: final path of the checkpoint.
        training: training progress.
        contents: contents of the files by name.
        tensors: the tensors, which are already written.
        tensor_bytes: sizes of the tensors' files.
        layout: layout of the ranks; None if the engines' own checkpoints hold it.
        hosts: names of the hosts whose folders hold a part each; empty if one folder holds everything.
    """
    hidden = hidden_folder(final)
    for name, content in contents.items():
        write_atomically(hidden / name, content)
    others = [path for path in hidden.iterdir() if path.is_file() and path.name not in tensor_bytes]
    written_by = {library: version(library) for library in ("pipekit", "torch", "deepspeed")}
    if hosts:
        written_by["hosts"] = ", ".join(hosts)
    manifest = Manifest(
        training=training,
        tensors=tensors,
        file_bytes={**tensor_bytes, **{path.name: path.stat().st_size for path in others}},
        written_by=written_by if layout is None else {**written_by, "layout": layout},
        file_checksums={path.name: file_checksum(path) for path in others},
    )
    write_atomically(hidden / MANIFEST_FILE, manifest.to_json())


def publish_checkpoint(final: Path, *, retention: Retention, update_latest: bool = True) -> None:
    """Rename a checkpoint to its final name, point `latest` to it, and remove checkpoints that are not kept."""
    # A run that was set back to an earlier step writes this one again.
    replace_folder(hidden_folder(final), final)
    keep_checkpoint(final, retention=retention, update_latest=update_latest)


def keep_checkpoint(final: Path, *, retention: Retention, update_latest: bool = True) -> None:
    """Point `latest` to a checkpoint with its final name, and remove checkpoints that are not kept."""
    if update_latest:
        write_atomically(final.parent / LATEST_FILE, final.name + "\n")
    for surplus in list_surplus(final.parent, retention):
        remove_checkpoint(surplus)
