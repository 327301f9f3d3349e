"""Lines wait for room, and nothing that is trained stops for them."""

from __future__ import annotations

import errno
import os
from io import TextIOWrapper
from pathlib import Path

import pytest

from pipekit.line_files import LineFile, LossyOutput


class Disk:
    """Takes the place of `os.write`, with room for so many bytes."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.room = 0
        self._write = os.write
        monkeypatch.setattr(os, "write", self.write)

    def write(self, descriptor: int, data: bytes) -> int:
        if not self.room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        done = self._write(descriptor, data[: self.room])
        self.room -= done
        return done


def test_lines_are_written_once_there_is_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk, warnings = Disk(monkeypatch), []
    path = tmp_path / "run" / "metrics.jsonl"
    file = LineFile(path, warnings.append)
    disk.room = 5
    file.write("one\n")
    file.write("two\n")  # of which one byte fits
    file.write("three\n")
    assert path.read_text() == "one\nt"
    assert len(warnings) == 1
    assert "metrics.jsonl: cannot be written: the disk is full" in warnings[0]
    assert "training goes on" in warnings[0]
    disk.room = 100
    file.write("four\n")
    file.close()
    assert path.read_text() == "one\ntwo\nthree\nfour\n"
    assert warnings[1:] == [f"{path}: written again, with 2 lines that waited"]


def test_lines_that_never_find_room_are_said_to_be_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk, warnings = Disk(monkeypatch), []
    path = tmp_path / "metrics.jsonl"
    file = LineFile(path, warnings.append)
    disk.room = 6
    for line in ("one\n", "two\n", "three\n"):
        file.write(line)
    file.close()
    assert path.read_text() == "one\n"
    assert warnings[1:] == [f"{path}: 2 lines are lost, since there was no room"]


def test_kept_lines_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk, warnings = Disk(monkeypatch), []
    monkeypatch.setattr(LineFile, "_MOST_KEPT", 3)
    file = LineFile(tmp_path / "lines", warnings.append)
    for number in range(6):
        file.write(f"{number}\n")
    disk.room = 100
    file.write("6\n")
    file.close()
    assert (tmp_path / "lines").read_text() == "0\n4\n5\n6\n"
    assert warnings[1:] == [f"{tmp_path / 'lines'}: written again, with 3 lines that waited; 3 older ones are lost"]


def test_a_file_that_cannot_be_opened_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(Exception, match=r"metrics\.jsonl: cannot be written: it is a folder"):
        LineFile(tmp_path / "metrics.jsonl", print)


def test_output_that_cannot_be_written_is_lost_and_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = Disk(monkeypatch)
    path = tmp_path / "rank-0.log"
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT)
    output = TextIOWrapper(LossyOutput(descriptor), write_through=True)
    print("lost", file=output)
    disk.room = 1000
    print("kept", file=output)
    os.close(descriptor)
    assert path.read_text() == "(5 bytes of output are lost: they could not be written)\nkept\n"
    with pytest.raises(OSError, match="Bad file"):
        output.write("closed")


def test_a_disk_that_refuses_output_is_not_an_error_of_the_program() -> None:
    with open("/dev/full", "wb") as full:
        print("x" * 10, file=TextIOWrapper(LossyOutput(full.fileno()), write_through=True))
