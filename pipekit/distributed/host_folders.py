"""Hosts of a run, told apart by the folder that their ranks see under one path, and copies of files between them."""

from __future__ import annotations

import os
import socket
import uuid
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from pipekit.checkpoint.manifest import Checksum
from pipekit.distributed.processes import gather_objects, raise_together, run_together
from pipekit.errors import ConfigError, PipekitError, StorageError
from pipekit.files import LATE_S, is_on_local_disk, sync_folder, wait_until_seen
from pipekit.storage import storing

LONGEST_WRITE = timedelta(hours=6)
"""Storage may be slow, and a rank that reads or writes is not heard from by those that wait for it."""

# So much of a file is in memory at a time.
_CHUNK_BYTES = 8 * 2**20


@dataclass(frozen=True)
class HostFolders:
    """The run folders of a run's hosts. Ranks that see the same folder are on the same host, for all that matters here.

    Attributes:
        ranks: the ranks of each host, the host of rank 0 first.
        names: the name of each host.
        own: index of this rank's host.
    """

    ranks: tuple[tuple[int, ...], ...]
    names: tuple[str, ...]
    own: int

    @classmethod
    def shared(cls) -> HostFolders:
        """One folder, which all ranks see."""
        return cls((tuple(range(dist.get_world_size())),), (socket.gethostname(),), 0)

    @classmethod
    def find(cls, folder: Path) -> HostFolders:
        """Tell by host and file system which ranks see the same folder; it is made. All ranks call this together."""

        def look() -> tuple[str, int, int]:
            with storing(folder):
                folder.mkdir(parents=True, exist_ok=True)
                found = folder.stat()
            return socket.gethostname(), found.st_dev, found.st_ino

        keys = gather_objects(run_together(look))
        hosts = {each: tuple(rank for rank, other in enumerate(keys) if other == each) for each in keys}
        return cls(tuple(hosts.values()), tuple(name for name, _, _ in hosts), list(hosts).index(keys[dist.get_rank()]))

    @property
    def leads(self) -> bool:
        """True on one rank of each host, which does what is done once in a folder."""
        return dist.get_rank() == self.ranks[self.own][0]

    @property
    def leaders(self) -> tuple[int, ...]:
        """That rank of each host."""
        return tuple(ranks[0] for ranks in self.ranks)

    @property
    def share(self) -> slice:
        """This rank's share of a list that the ranks of its host share out."""
        ranks = self.ranks[self.own]
        return slice(ranks.index(dist.get_rank()), None, len(ranks))

    def on_each(self, work: Callable[[], object], path: Path, group: dist.ProcessGroup) -> None:
        """Do something at `path` once on each host. All ranks call this together, and raise the error of any."""

        def act() -> None:
            if self.leads:
                with storing(path):
                    work()

        run_together(act, group=group)


@contextmanager
def patient_group() -> Iterator[dist.ProcessGroup]:
    """A group of all ranks whose waits may last as long as storage needs. All ranks call this together."""
    group = dist.new_group(backend="gloo", timeout=LONGEST_WRITE)
    try:
        yield group
    finally:
        with suppress(RuntimeError):
            dist.destroy_process_group(group)


def check_folders(
    folder: Path, hosts: HostFolders, *, are_shared: bool, advice: str = "", late_s: float = LATE_S
) -> None:
    """Check by writing into it that a folder is shared by all hosts, or by none. All ranks call this together.

    Args:
        folder: the run's folder.
        hosts: the hosts, which `HostFolders.find` tells apart.
        are_shared: whether all are to see one folder.
        advice: what to do beside sharing one.
        late_s: seconds within which a shared folder shows what another host has written.

    Raises:
        ConfigError: on every rank, if not; the message names two hosts.
    """
    if len(hosts.ranks) == 1:
        return
    tokens = gather_objects(f".seen-{uuid.uuid4().hex}")
    # No other machine sees a local disk.
    is_known = not are_shared and all(gather_objects(is_on_local_disk(folder)))
    own = folder / tokens[dist.get_rank()]

    def leave_token() -> None:
        if hosts.leads:
            with storing(folder):
                own.touch()

    try:
        run_together(leave_token)
        others = [leader for leader in ((0,) if are_shared else hosts.leaders) if leader != dist.get_rank()]
        limit_s = late_s if are_shared else 0.0
        looks = hosts.leads and not is_known
        views = gather_objects({leader for leader in others if looks and _is_seen(folder / tokens[leader], limit_s)})
    finally:
        own.unlink(missing_ok=True)
    first = hosts.names[0]
    for name, leader in zip(hosts.names[1:], hosts.leaders[1:], strict=True):
        if are_shared and 0 not in views[leader]:
            raise ConfigError(
                f"run.dir={folder}: what {first} writes there is not seen on {name}, so they do not "
                f"share it; give a folder that all hosts share{advice}"
            )
    for name, leader in zip(hosts.names, hosts.leaders, strict=True):
        if not are_shared and views[leader]:
            other = hosts.names[hosts.leaders.index(min(views[leader]))]
            raise ConfigError(
                f"checkpoint.storage=local: {name} and {other} share run.dir={folder}, and would overwrite each "
                "other's files; give a folder on a disk of each host, or set checkpoint.storage=shared"
            )


def _is_seen(path: Path, limit_s: float) -> bool:
    try:
        wait_until_seen({path: None}, limit_s=limit_s)
    except StorageError:
        return False
    return True


@dataclass(frozen=True)
class Transfer:
    """A file that one rank reads from its folder, and another writes into its own under the same name."""

    file: str
    num_bytes: int
    source: int
    target: int


def plan_copies(files: Mapping[int, Mapping[str, int]], hosts: HostFolders) -> list[Transfer]:
    """The transfers after which each host has its neighbour's files too.

    Args:
        files: sizes of the files that each rank has written.
        hosts: the hosts.

    Example:
        >>> hosts = HostFolders(((0, 1), (2,)), ("a", "b"), 0)
        >>> [(each.file, each.source, each.target) for each in plan_copies({0: {"x": 1}, 2: {"y": 1}}, hosts)]
        [('x', 0, 2), ('y', 2, 0)]
    """
    transfers = []
    number = len(hosts.ranks)
    # Every other host sends first, so that all are busy at a time.
    for host in [*range(0, number, 2), *range(1, number, 2)] if number > 1 else []:
        targets = hosts.ranks[(host + 1) % number]
        for place, rank in enumerate(hosts.ranks[host]):
            target = targets[place % len(targets)]
            transfers += [Transfer(file, size, rank, target) for file, size in files.get(rank, {}).items()]
    return transfers


def plan_gathering(sizes: Mapping[str, int], holdings: Sequence[Collection[str]], hosts: HostFolders) -> list[Transfer]:
    """The transfers after which each host has every file; the work is shared out among those that have one.

    Args:
        sizes: of all files.
        holdings: the files that each host has; each is somewhere.
        hosts: the hosts.
    """
    transfers: list[Transfer] = []
    sent, received = Counter[int](), Counter[int]()
    for file, size in sizes.items():
        sources = [rank for host, has in enumerate(holdings) if file in has for rank in hosts.ranks[host]]
        for host, has in enumerate(holdings):
            if file not in has:
                source = min(sources, key=lambda rank: sent[rank])
                target = min(hosts.ranks[host], key=lambda rank: received[rank])
                sent[source] += size
                received[target] += size
                transfers.append(Transfer(file, size, source, target))
    return transfers


def transfer_files(folder: Path, transfers: Sequence[Transfer], group: dist.ProcessGroup) -> None:
    """Send files between ranks in chunks, and compare their checksums. All ranks call this together.

    A file appears under its name once it is whole and on the disk.

    Args:
        folder: where each rank reads or writes; the path may be another on each.
        transfers: the same on all ranks.
        group: of all ranks, over gloo.

    Raises:
        StorageError: on every rank, if a file could not be read or written, or did not arrive as it was sent.
    """
    error: PipekitError | None = None
    # In one order for all ranks, so that none waits for one that waits for it.
    for transfer in transfers:
        try:
            if transfer.source == dist.get_rank():
                _send(folder / transfer.file, transfer, group)
            elif transfer.target == dist.get_rank():
                _receive(folder / transfer.file, transfer, group)
        except PipekitError as failure:
            error = error or failure
    raise_together(error, group)


def _chunks(num_bytes: int) -> Iterator[tuple[torch.Tensor, memoryview]]:
    """Pieces of one memory, one for each chunk of so many bytes."""
    memory = torch.empty(min(num_bytes, _CHUNK_BYTES), dtype=torch.uint8)
    for begin in range(0, num_bytes, _CHUNK_BYTES):
        piece = memory[: min(_CHUNK_BYTES, num_bytes - begin)]
        yield piece, piece.numpy().data


def _send(path: Path, transfer: Transfer, group: dist.ProcessGroup) -> None:
    """Send a file; where it cannot be read, the other rank gets as many bytes, and zeros as their checksum."""
    error: PipekitError | None = None
    value, file = Checksum(), None
    try:
        with storing(path, doing="read"):
            file = path.open("rb", buffering=0)
    except PipekitError as failure:
        error = failure
    for piece, view in _chunks(transfer.num_bytes):
        try:
            with storing(path, doing="read"):
                if file is not None and error is None and file.readinto(view) != len(view):
                    raise StorageError(f"{path}: became shorter while it was read")
        except PipekitError as failure:
            error = failure
        dist.send(piece, transfer.target, group=group)
        value.update(view)
    if file is not None:
        file.close()
    digest = value.digest() if error is None else bytes(len(value.digest()))
    dist.send(torch.from_numpy(np.frombuffer(digest, dtype=np.uint8).copy()), transfer.target, group=group)
    if error is not None:
        raise error


def _receive(path: Path, transfer: Transfer, group: dist.ProcessGroup) -> None:
    """Receive a file, to the end also where it cannot be written."""
    error: PipekitError | None = None
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    value, file = Checksum(), None
    try:
        try:
            with storing(path, needed_bytes=transfer.num_bytes):
                file = temporary.open("wb", buffering=0)
        except PipekitError as failure:
            error = failure
        for piece, view in _chunks(transfer.num_bytes):
            dist.recv(piece, transfer.source, group=group)
            value.update(view)
            try:
                with storing(path, needed_bytes=transfer.num_bytes):
                    while file is not None and error is None and view:
                        view = view[file.write(view) :]
            except PipekitError as failure:
                error = failure
        digest = torch.empty(len(value.digest()), dtype=torch.uint8)
        dist.recv(digest, transfer.source, group=group)
        if error is not None:
            raise error
        if not digest.any():
            return  # the sender says why
        if digest.numpy().tobytes() != value.digest():
            raise StorageError(f"{path}: did not arrive from rank {transfer.source} as it was sent; see both disks")
        with storing(path, needed_bytes=transfer.num_bytes):
            assert file is not None
            os.fsync(file.fileno())
            temporary.replace(path)
            sync_folder(path.parent)
    finally:
        if file is not None:
            file.close()
        temporary.unlink(missing_ok=True)
