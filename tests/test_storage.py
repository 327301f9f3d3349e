"""Errors of the disk name the path, what is wrong, the room, and what to do."""

from __future__ import annotations

import errno
import os
import resource
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from pipekit.checkpoint.writer import write_tensors
from pipekit.errors import ExitCode, PathError, StorageError
from pipekit.files import building_folder
from pipekit.storage import check_writable, error_number, find_storage_error, storage_error, storing


@pytest.mark.parametrize(
    ("number", "what", "remedy"),
    [
        (errno.ENOSPC, r"the disk is full \(5\.0 GB to be written, [\d,.]+ \w+ free\)", "make room"),
        (errno.EDQUOT, "your quota there is used up", "larger quota"),
        (errno.EROFS, "the file system is read-only", "mounted for writing"),
        (errno.EACCES, "no permission", "another folder"),
        (errno.EIO, "the disk failed", "dmesg"),
        (errno.EMFILE, "too many open files", "ulimit -n"),
        (errno.ESTALE, "stale handle", "mounted again"),
    ],
)
def test_an_error_of_the_disk_says_what_is_wrong_and_what_to_do(
    tmp_path: Path, number: int, what: str, remedy: str
) -> None:
    with (
        pytest.raises(StorageError, match=rf"{tmp_path}/x: cannot be written: .*{what}.*; .*{remedy}") as caught,
        storing(tmp_path / "x", needed_bytes=5 * 10**9),
    ):
        raise OSError(number, os.strerror(number))
    assert caught.value.exit_code == ExitCode.STORAGE


def test_a_path_below_a_file_is_a_mistake(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(
        PathError, match=r"run\.dir=.*file/run: cannot be written: a part of this path is a file"
    ) as caught:
        check_writable(tmp_path / "file/run", name="run.dir=")
    assert caught.value.exit_code == ExitCode.MISTAKE


def test_a_missing_file_is_no_wrong_path_where_its_folder_is_there(tmp_path: Path) -> None:
    missing = OSError(errno.ENOENT, os.strerror(errno.ENOENT))
    in_folder, without = (storage_error(missing, tmp_path / name, doing="read") for name in ("x", "no/x"))
    assert (type(in_folder), str(in_folder)) == (
        StorageError,
        f"{tmp_path}/x: cannot be read: No such file or directory",
    )
    assert (type(without), str(without)) == (
        PathError,
        f"{tmp_path}/no/x: cannot be read: no such folder; make it, or give another path",
    )


def test_an_error_without_a_path_is_one_of_the_disk_only_where_nothing_else_has_it() -> None:
    for number, is_of_disk in ((errno.ENOSPC, True), (errno.EIO, False), (errno.EACCES, False)):
        assert (find_storage_error(OSError(number, ""), None) is not None) == is_of_disk


def test_a_folder_that_can_be_written_stays_as_it_is(tmp_path: Path) -> None:
    check_writable(tmp_path / "not/there/yet")
    assert list(tmp_path.iterdir()) == []


def test_an_error_that_a_library_has_wrapped_is_found(tmp_path: Path) -> None:
    with pytest.raises(SafetensorError) as caught:
        save_file({"a": torch.ones(2)}, tmp_path / "no" / "folder")
    assert error_number(caught.value) == errno.ENOENT
    with pytest.raises(RuntimeError) as unmapped:
        torch.UntypedStorage.from_file(str(tmp_path / "missing"), shared=False, nbytes=8)
    assert error_number(unmapped.value) == errno.ENOENT
    assert error_number(RuntimeError("shapes differ: (2, 28) and (28)")) is None
    with pytest.raises(ValueError, match="not of the disk"), storing(tmp_path):
        raise ValueError("not of the disk")


def test_a_file_that_the_system_does_not_let_grow_is_told_and_the_folder_goes(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
    try:
        with (
            pytest.raises(StorageError, match=r"w\.safetensors: .*larger than the system allows.*ulimit -f"),
            building_folder(tmp_path / "out") as folder,
        ):
            write_tensors(folder / "w.safetensors", {"a": torch.zeros(10_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_error_is_told_as_the_system_names_it(tmp_path: Path) -> None:
    error = storage_error(OSError(errno.EBUSY, "Device or resource busy"), tmp_path, doing="read")
    assert str(error) == f"{tmp_path}: cannot be read: Device or resource busy"
