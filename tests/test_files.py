"""Files are replaced whole, and nothing else is left behind."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from late_disk import LateDisk
from pipekit import files
from pipekit.errors import StorageError
from pipekit.files import (
    LATE_S,
    file_system,
    is_on_local_disk,
    look_anew,
    read_regular,
    replace_folder,
    wait_until_seen,
    write_atomically,
)


def test_a_file_is_replaced_whole_and_nothing_else_is_left(tmp_path: Path) -> None:
    path = tmp_path / "latest"
    for text in ("first", "ü\n"):
        write_atomically(path, text)
        assert path.read_text(encoding="utf-8") == text
    assert list(tmp_path.iterdir()) == [path]


def test_a_failed_write_leaves_the_old_file_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "latest"
    write_atomically(path, "old")

    def fail(self: Path, target: Path) -> Path:
        raise OSError("no space left on device")

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(OSError, match="no space"):
        write_atomically(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("swaps", [True, False], ids=["swapped", "where names cannot be swapped"])
def test_a_folder_takes_the_place_of_an_earlier_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, swaps: bool
) -> None:
    if not swaps:
        monkeypatch.setattr("pipekit.files._swap", lambda one, other: False)
    for content in ("first", "second"):
        temporary = tmp_path / "temporary"
        temporary.mkdir()
        (temporary / content).touch()
        replace_folder(temporary, tmp_path / "final")
    assert [path.relative_to(tmp_path).as_posix() for path in sorted(tmp_path.rglob("*"))] == ["final", "final/second"]


def test_the_earlier_folder_is_there_until_the_new_one_is_in_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    final, temporary = tmp_path / "final", tmp_path / "temporary"
    for folder in (final, temporary):
        folder.mkdir()
        (folder / folder.name).touch()
    removed: list[list[Path]] = []
    monkeypatch.setattr("shutil.rmtree", lambda path: removed.append([*path.iterdir(), *final.iterdir()]))
    replace_folder(temporary, final)
    assert [[path.name for path in paths] for paths in removed] == [["final", "temporary"]]


def test_the_final_name_is_never_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    final, temporary = tmp_path / "final", tmp_path / "temporary"
    final.mkdir()
    temporary.mkdir()
    original = Path.rename

    def rename(self: Path, target: Path) -> Path:
        renamed = original(self, target)
        assert final.is_dir(), "a run that is killed now finds no checkpoint"
        return renamed

    monkeypatch.setattr(Path, "rename", rename)
    replace_folder(temporary, final)


def test_file_system_of_a_folder() -> None:
    if sys.platform != "linux":
        pytest.skip("reads /proc")
    assert file_system(Path("/proc/self")) == "proc"
    assert not is_on_local_disk(Path("/proc/self"))


def test_what_another_machine_has_written_is_waited_for(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    file = tmp_path / "folder" / "file"
    file.write_bytes(bytes(10))
    with LateDisk({"folder": 20.0, "file": 45.0}) as disk:
        wait_until_seen({tmp_path / "folder": None, file: 10})
        assert 45 <= disk.now_s < 47
        wait_until_seen({file: 10}, find_fault=lambda: "is another" if disk.now_s < 60 else None)
        assert 60 <= disk.now_s < 62


def test_a_wait_for_another_machine_has_a_limit_and_names_what_is_missing(tmp_path: Path) -> None:
    file = tmp_path / "weights-0001.safetensors"
    file.write_bytes(bytes(10))
    with LateDisk({"never": 1000.0}) as disk:
        with pytest.raises(StorageError, match=rf"{file}: has 10 bytes of 2,000 on this machine, 90 s after another"):
            wait_until_seen({file: 2000})
        assert disk.now_s == LATE_S
        with pytest.raises(StorageError, match=r"never: is not there on this machine, 5 s .*lookupcache=none"):
            wait_until_seen({tmp_path / "never": None}, limit_s=5)
        with pytest.raises(StorageError, match=r"yaml: is another on this machine, 5 s"):
            wait_until_seen({file: 10}, find_fault=lambda: "config.yaml: is another", limit_s=5)


def test_a_disk_of_this_machine_alone_is_not_waited_for(tmp_path: Path) -> None:
    with LateDisk({}) as disk:
        files.is_on_local_disk = lambda folder: True
        with pytest.raises(StorageError, match=r"step: is not there on this machine, which shares this disk with no"):
            wait_until_seen({tmp_path / "no" / "step": None})
    assert disk.now_s == 0


def test_sizes_of_files_and_folders_that_are_looked_at_anew(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(3))
    assert [look_anew(tmp_path / name) for name in ("file", "missing", "no/folder")] == [3, None, None]
    assert look_anew(tmp_path) is not None


def test_a_folder_is_opened_before_what_is_in_it_so_that_nfs_asks_its_server(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[Path] = []
    original = os.open
    monkeypatch.setattr(os, "open", lambda path, *rest: opened.append(path) or original(path, *rest))
    assert look_anew(tmp_path / "missing") is None
    assert opened == [tmp_path, tmp_path / "missing"]


def test_pipes_and_files_that_are_too_long_are_not_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="is a pipe or a device"):
        read_regular(tmp_path / "pipe", max_bytes=10)
    (tmp_path / "file").write_bytes(bytes(11))
    with pytest.raises(OSError, match="is longer than 10 bytes"):
        read_regular(tmp_path / "file", max_bytes=10)
    assert read_regular(tmp_path / "file", max_bytes=11) == bytes(11)
