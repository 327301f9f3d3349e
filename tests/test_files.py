"""Files are replaced whole, and nothing else is left behind."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from pipekit.files import file_system, is_on_local_disk, replace_folder, write_atomically


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
