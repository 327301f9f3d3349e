"""Gathering a checkpoint, of which each host has a part and a second copy of its neighbour's, onto all hosts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch.distributed as dist

from pipekit.checkpoint.manifest import (
    CHECKPOINTS_FOLDER,
    LATEST_FILE,
    MANIFEST_FILE,
    Manifest,
    checksum,
    find_latest,
    list_checkpoints,
    load_manifest,
    read_manifest,
)
from pipekit.checkpoint.reader import sound_files
from pipekit.distributed.host_folders import HostFolders, Transfer, patient_group, plan_gathering, transfer_files
from pipekit.distributed.processes import gather_objects, tell_object
from pipekit.errors import DamagedCheckpointError, PipekitError
from pipekit.files import write_atomically


@dataclass(frozen=True)
class _View:
    """Checkpoints in the folder of one host: the name in `latest`, and checksums of the manifests that are sound."""

    latest: str | None = None
    manifests: dict[str, str] = field(default_factory=dict)


def gather_newest(folder: Path, hosts: HostFolders) -> str:
    """Make the newest checkpoint that is whole, once all hosts put together what they have, whole on each of them.

    `latest` names it on all of them afterwards. Every byte is read, and files that a host lacks, or has damaged, are
    sent by one that has them. All ranks call this together.

    Args:
        folder: the run's `checkpoints` folder, of which each host has its own.
        hosts: the hosts.

    Returns:
        A warning where a newer one is whole on no host and not together either; empty otherwise.

    Raises:
        DamagedCheckpointError: on every rank, if there are checkpoints, and none of them is whole.
        StorageError: on every rank, if a file cannot be read or written.
    """
    with patient_group() as group:
        views = _views(folder, hosts, group)
        names = {name for view in views for name in view.manifests}
        newest = max((view.latest for view in views if view.latest in names), default=max(names, default=""))
        fault = ""
        for name in sorted((name for name in names if name <= newest), reverse=True):
            found = _gather(folder / name, views, hosts, group)
            if not found:
                hosts.on_each(partial(write_atomically, folder / LATEST_FILE, f"{name}\n"), folder, group)
                return f"{fault}; going on from {folder / name} instead" if fault else ""
            fault = fault or found
    if fault:
        raise DamagedCheckpointError(fault)
    return ""


def gather_named(checkpoint: Path, hosts: HostFolders, *, verify: bool) -> None:
    """Make one checkpoint whole on every host; see `gather_newest`.

    Args:
        checkpoint: its path, the same on all hosts.
        hosts: the hosts.
        verify: whether to read every byte also where no file is missing.
    """
    with patient_group() as group:
        is_whole = False
        if hosts.leads and not verify:
            with suppress(PipekitError):
                is_whole = bool(load_manifest(checkpoint))
        if all(is_whole or rank not in hosts.leaders for rank, is_whole in enumerate(gather_objects(is_whole, group))):
            return
        fault = _gather(checkpoint, _views(checkpoint.parent, hosts, group), hosts, group)
    if fault:
        raise DamagedCheckpointError(fault)


def gather_start(resume: str, folder: Path, hosts: HostFolders) -> str:
    """Make the checkpoint that a run goes on from whole on every host, and return a warning; see `gather_newest`.

    Args:
        resume: `auto`, `never`, or the path of a checkpoint or of a run.
        folder: the run's `checkpoints` folder.
        hosts: the hosts.
    """
    if resume == "never":
        return ""
    if resume == "auto":
        return gather_newest(folder, hosts)
    path = Path(resume)
    # A host whose folder is empty cannot tell which of them it is.
    kinds = gather_objects(
        "checkpoint"
        if (path / MANIFEST_FILE).is_file()
        else next((place for place in (CHECKPOINTS_FOLDER, ".") if list_checkpoints(path / place)), None)
    )
    kind = next(filter(None, kinds), None)
    if kind == "checkpoint":
        gather_named(path, hosts, verify=True)
        return ""
    return "" if kind is None else gather_newest(path / kind, hosts)


def gather_file(path: Path, hosts: HostFolders) -> None:
    """Copy a file that all hosts write, from the one that has most of it, to those that have none."""
    with patient_group() as group:
        sizes = gather_objects(path.stat().st_size if path.is_file() else -1, group)
        longest = max(hosts.leaders, key=lambda leader: sizes[leader])
        lacking = [leader for leader in hosts.leaders if sizes[leader] < 0 <= sizes[longest]]
        transfers = [Transfer(path.name, sizes[longest], longest, leader) for leader in lacking]
        transfer_files(path.parent, transfers, group)


def _views(folder: Path, hosts: HostFolders, group: dist.ProcessGroup) -> list[_View]:
    view = _View()
    if hosts.leads:
        latest = None
        with suppress(PipekitError, OSError):
            latest = find_latest(folder)
        view = _View(None if latest is None else latest.name)
        for path in list_checkpoints(folder):
            with suppress(PipekitError):
                view.manifests[path.name] = checksum(read_manifest(path).to_json().encode())
    everyones = gather_objects(view, group)
    return [everyones[leader] for leader in hosts.leaders]


def _gather(checkpoint: Path, views: Sequence[_View], hosts: HostFolders, group: dist.ProcessGroup) -> str:
    """Make a checkpoint whole on every host; return what is wrong with it where it cannot be."""
    fault = f"{checkpoint}: no host has it"
    # Of two under one name, that which more hosts have.
    for version, _ in Counter(each.manifests.get(checkpoint.name) for each in views).most_common():
        if version is None:
            continue
        host = next(host for host, view in enumerate(views) if view.manifests.get(checkpoint.name) == version)
        leader = hosts.leaders[host]
        own = ""  # no manifest, and an error on all ranks
        if dist.get_rank() == leader:
            with suppress(OSError):
                own = (checkpoint / MANIFEST_FILE).read_text(encoding="utf-8")
        text = tell_object(own, group, source=leader)
        manifest = Manifest.from_json(text, where=f"{checkpoint / MANIFEST_FILE} on {hosts.names[host]}")
        found = sound_files(checkpoint, manifest, sorted(manifest.file_bytes)[hosts.share])
        by_rank = gather_objects(found, group)
        holdings = [{file for rank in ranks for file in by_rank[rank]} for ranks in hosts.ranks]
        lost = manifest.file_bytes.keys() - set().union(*holdings)
        if lost:
            others = f" and {len(lost) - 1} more" if len(lost) > 1 else ""
            fault = (
                f"{checkpoint}: {min(lost)}{others} {'are' if others else 'is'} missing or damaged on all hosts "
                f"({', '.join(hosts.names)})"
            )
            continue
        has_version = [view.manifests.get(checkpoint.name) == version for view in views]
        if not all(has_version) or any(len(has) < len(manifest.file_bytes) for has in holdings):
            lacks = not has_version[hosts.own]
            hosts.on_each(partial(_make_room, checkpoint) if lacks else _nothing, checkpoint, group)
            transfer_files(checkpoint, plan_gathering(manifest.file_bytes, holdings, hosts), group)
            # Last, as it makes a checkpoint of the folder.
            write = partial(write_atomically, checkpoint / MANIFEST_FILE, text)
            hosts.on_each(write if lacks else _nothing, checkpoint, group)
        return ""
    return fault


def _nothing() -> None:
    pass


def _make_room(checkpoint: Path) -> None:
    """Make a folder that is no checkpoint until its manifest comes."""
    if checkpoint.is_symlink() or checkpoint.is_file():
        checkpoint.unlink()
    checkpoint.mkdir(parents=True, exist_ok=True)
    (checkpoint / MANIFEST_FILE).unlink(missing_ok=True)
