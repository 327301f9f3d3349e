"""Publishing a checkpoint: it is filled in a hidden folder, and gets its name once it is whole. One rank does this."""

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
    """Path of the folder in which a checkpoint is filled: the same on every rank."""
    return final.with_name(f".{final.name}.tmp")


def begin_checkpoint(final: Path) -> None:
    """Make the hidden folder of a checkpoint, and remove what interrupted saves have left beside it."""
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
    """Write files into the hidden folder of a checkpoint, and its manifest, which knows these and all that lie there.

    Args:
        final: the checkpoint.
        training: the state of the training.
        contents: the files by name.
        tensors: the tensors, which have been written.
        tensor_bytes: sizes of their files.
        layout: what the ranks were; None where the engines' own checkpoints say it.
        hosts: names of the hosts whose folders hold a part each; empty where one folder holds all of it.
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
    """Give a checkpoint its name, let `latest` name it, and remove those that are not kept."""
    # A run that was set back to an earlier step writes this one again.
    replace_folder(hidden_folder(final), final)
    keep_checkpoint(final, retention=retention, update_latest=update_latest)


def keep_checkpoint(final: Path, *, retention: Retention, update_latest: bool = True) -> None:
    """Let `latest` name a checkpoint that has its name, and remove those that are not kept."""
    if update_latest:
        write_atomically(final.parent / LATEST_FILE, final.name + "\n")
    for surplus in list_surplus(final.parent, retention):
        remove_checkpoint(surplus)
