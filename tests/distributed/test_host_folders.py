"""Hosts told apart by the folders that their ranks see, and files sent between them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from gloo_workers import GlooWorkers
from pipekit.distributed import host_folders
from pipekit.distributed.host_folders import (
    HostFolders,
    Transfer,
    check_folders,
    patient_group,
    plan_copies,
    plan_gathering,
    transfer_files,
)
from pipekit.errors import ConfigError, PipekitError, StorageError

THREE = HostFolders(((0, 1), (2,), (3, 4)), ("a", "b", "c"), 0)


def held(transfers: list[Transfer], holdings: list[set[str]], hosts: HostFolders) -> list[set[str]]:
    """Files of each host once the transfers are made, each by a rank that has the file or had it sent."""
    host_of = {rank: host for host, ranks in enumerate(hosts.ranks) for rank in ranks}
    after = [set(has) for has in holdings]
    for transfer in transfers:
        assert transfer.file in holdings[host_of[transfer.source]]
        assert transfer.file not in after[host_of[transfer.target]]
        after[host_of[transfer.target]].add(transfer.file)
    return after


def test_every_file_gets_a_second_copy_on_another_host() -> None:
    files = {rank: {f"weights-{rank}": 10 + rank} for rank in range(5)}
    holdings = [{name for rank in ranks for name in files[rank]} for ranks in THREE.ranks]
    after = held(plan_copies(files, THREE), holdings, THREE)
    for name in set().union(*holdings):
        assert sum(name in has for has in after) == 2
    assert plan_copies(files, HostFolders(((0, 1, 2, 3, 4),), ("a",), 0)) == []


def test_what_hosts_lack_is_sent_by_those_that_have_it_in_equal_shares() -> None:
    sizes = {f"weights-{index}": 100 for index in range(8)}
    holdings: list[set[str]] = [set(sizes), set(), set(sizes)]
    transfers = plan_gathering(sizes, holdings, THREE)
    assert held(transfers, holdings, THREE) == [set(sizes)] * 3
    assert [sum(each.source == rank for each in transfers) for rank in range(5)] == [2, 2, 0, 2, 2]


def attempt(call: Callable[..., Any], *args: Any, **options: Any) -> str:
    try:
        call(*args, **options)
    except PipekitError as error:
        return f"{type(error).__name__}: {error}"
    return ""


def check_job(rank: int, folders: list[str]) -> list[Any]:
    own = HostFolders.find(Path(folders[rank]))
    found = [own.ranks, own.leads, own.share]
    found += [attempt(check_folders, Path(folders[rank]), own, are_shared=True, advice=", or x", late_s=0.2)]
    found += [attempt(check_folders, Path(folders[rank]), own, are_shared=False)]
    # As two hosts see a folder of a file server: one, under different numbers.
    two = HostFolders(((0,), (1, 2)), ("a", "b"), int(rank > 0))
    host_folders.is_on_local_disk = lambda folder: False  # type: ignore[attr-defined]
    found += [attempt(check_folders, Path(folders[0]), two, are_shared=True)]
    return [*found, attempt(check_folders, Path(folders[0]), two, are_shared=False, late_s=0.2)]


@pytest.mark.distributed
def test_hosts_are_told_apart_by_their_folders_which_are_all_shared_or_none_is(
    gloo: GlooWorkers, tmp_path: Path
) -> None:
    folders = [str(tmp_path / name) for name in ("one", "two", "two")]
    results = gloo.run(3, check_job, folders)
    assert [result[:3] for result in results] == [
        [((0,), (1, 2)), True, slice(0, None, 1)],
        [((0,), (1, 2)), True, slice(0, None, 2)],
        [((0,), (1, 2)), False, slice(1, None, 2)],
    ]
    for rank, (unshared, local, shared, twice) in enumerate(result[3:] for result in results):
        assert unshared.startswith(f"ConfigError: run.dir={folders[rank]}: what ")
        assert "is not seen on" in unshared
        assert unshared.endswith("so they do not share it; give a folder that all hosts share, or x")
        assert (local, shared) == ("", "")
        assert twice.startswith(f"{ConfigError.__name__}: checkpoint.storage=local: a and b share run.dir={folders[0]}")
    assert not any(path.name.startswith(".seen") for path in tmp_path.rglob("*"))


def transfer_job(rank: int, folders: list[str]) -> list[str]:
    host_folders._CHUNK_BYTES = 1000
    folder, said = Path(folders[rank]), []
    with patient_group() as group:
        ring = [Transfer(f"of-{each}", 2500, each, (each + 1) % 3) for each in (0, 2, 1)]
        transfer_files(folder, [*ring, Transfer("empty", 0, 0, 1)], group)
        said.append(attempt(transfer_files, folder, [Transfer("gone", 1500, 2, 0), *ring], group))
        said.append(attempt(transfer_files, folder, [Transfer("of-0", 3500, 0, 2), *ring], group))
        said.append(attempt(transfer_files, folder / ("no" if rank == 2 else ""), ring[2:] + ring[:1], group))
        if rank == 1:
            receive, dist.recv = dist.recv, _receive_with_a_flipped_bit  # type: ignore[assignment]
            globals()["_receive"] = receive
        said.append(attempt(transfer_files, folder, [Transfer("of-0", 2500, 0, 1)], group))
    return said


def _receive_with_a_flipped_bit(tensor: Any, *args: Any, **options: Any) -> None:
    globals()["_receive"](tensor, *args, **options)
    if len(tensor) == 500:
        tensor[3] ^= 1


@pytest.mark.distributed
def test_files_are_sent_in_a_ring_and_a_failure_of_any_is_raised_on_all(gloo: GlooWorkers, tmp_path: Path) -> None:
    folders = [tmp_path / f"host-{rank}" for rank in range(3)]
    for rank, folder in enumerate(folders):
        folder.mkdir()
        (folder / f"of-{rank}").write_bytes(bytes(range(250)) * 10)
    (folders[0] / "empty").touch()
    results = gloo.run(3, transfer_job, [str(folder) for folder in folders])
    gone, short, unwritable, flipped = results[0]
    assert "host-2/gone: cannot be read" in gone
    assert "host-0/of-0: became shorter while it was read" in short
    assert "host-2/no/of-1: cannot be written: no such folder" in unwritable
    assert flipped.startswith(f"{StorageError.__name__}: {folders[1]}/of-0: did not arrive from rank 0 as it was sent")
    for result in results[1:]:
        # A rank with an error of its own raises that, the others the first.
        assert all(result)
        assert [said.partition(":")[0] for said in result] == [said.partition(":")[0] for said in results[0]]
    for rank, folder in enumerate(folders):
        names = {f"of-{rank}", f"of-{(rank - 1) % 3}"} | ({"empty"} if rank < 2 else set())
        assert {path.name for path in folder.iterdir()} == names
        assert all(path.read_bytes() in (b"", bytes(range(250)) * 10) for path in folder.iterdir())
