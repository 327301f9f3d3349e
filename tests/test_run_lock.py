"""One writer a run folder: who holds it, who is told so, and how it becomes free."""

from __future__ import annotations

import errno
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipekit import run_lock
from pipekit.errors import ConfigError, ExitCode, InUseError, StorageError
from pipekit.run_lock import LOCK_FILE, Owner, hold_run

HOLDER = """
import os, sys, time
from pipekit.run_lock import hold_run
with hold_run(sys.argv[1]):
    # The child says it, if there is to be one: from then on it does not hold the lock.
    if sys.argv[2] != "fork" or os.fork() == 0:
        print("held", flush=True)
    time.sleep(60)
    os._exit(0)
"""


def start_holder(folder: Path, what: str = "") -> subprocess.Popen[str]:
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(folder), what], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    return holder


def test_a_second_start_says_who_has_it_until_that_is_dead(tmp_path: Path) -> None:
    holder = start_holder(tmp_path)
    try:
        before = sorted(tmp_path.iterdir())
        told = rf"held by process {holder.pid} since 20.* \(-c .*\), .*\(kill {holder.pid}\)"
        with pytest.raises(InUseError, match=told) as caught, hold_run(tmp_path):
            pass
        assert caught.value.exit_code == ExitCode.IN_USE
        assert sorted(tmp_path.iterdir()) == before
    finally:
        holder.kill()
        holder.communicate()
    with hold_run(tmp_path):
        pass
    assert list(tmp_path.iterdir()) == []


def test_processes_that_a_dead_owner_has_forked_do_not_hold_it(tmp_path: Path) -> None:
    holder = start_holder(tmp_path, "fork")
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait()
    try:
        os.killpg(holder.pid, 0)  # the child is there
        with hold_run(tmp_path):
            pass
    finally:
        os.killpg(holder.pid, signal.SIGKILL)
        holder.communicate()


def test_a_folder_that_nothing_was_written_into_goes(tmp_path: Path) -> None:
    with hold_run(tmp_path / "runs" / "empty"):
        assert (tmp_path / "runs" / "empty" / LOCK_FILE).is_file()
    assert list(tmp_path.iterdir()) == []
    with hold_run(tmp_path / "runs" / "full"):
        (tmp_path / "runs" / "full" / "config.yaml").touch()
    assert [path.name for path in (tmp_path / "runs" / "full").iterdir()] == ["config.yaml"]


def test_a_file_in_its_way_and_a_folder_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(ConfigError, match="is a file, or leads through one"), hold_run(path):
            pass

    def refuse(*_: object) -> int:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(StorageError, match="the file system is read-only"), hold_run(tmp_path / "run"):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_folder_that_vanishes_while_it_is_made_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make, left = Path.mkdir, [2]

    def make_late(path: Path, *arguments: Any, **options: Any) -> None:
        left[0] -= 1
        if left[0] >= 0:  # another owner's end has removed it between mkdir and the look at what was in its way
            raise FileExistsError(errno.EEXIST, "File exists", str(path))
        make(path, *arguments, **options)

    monkeypatch.setattr(Path, "mkdir", make_late)
    with hold_run(tmp_path / "run"):
        assert (tmp_path / "run" / LOCK_FILE).is_file()
    monkeypatch.undo()
    for name, path in (("lost", tmp_path / "lost"), ("parent", tmp_path / "parent" / "run")):
        (tmp_path / name).symlink_to("nowhere")
        with pytest.raises(ConfigError, match="is a file, or leads through one"), hold_run(path):
            pass


def test_a_full_disk_leaves_no_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwrite", refuse)
    with pytest.raises(StorageError, match="the disk is full"), hold_run(tmp_path / "run"):
        pass
    assert list(tmp_path.iterdir()) == []


def winners(folder: Path, number: int, *, stale_s: float = 30.0) -> int:
    """Number of threads, of those that begin at once, that get a folder while none gives it back."""
    begin, tried, won = threading.Barrier(number), threading.Barrier(number), []

    def start() -> None:
        begin.wait()
        try:
            with hold_run(folder, stale_s=stale_s):
                won.append(1)
                tried.wait()
        except InUseError:
            tried.wait()

    threads = [threading.Thread(target=start) for _ in range(number)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return len(won)


def test_of_starts_at_one_instant_exactly_one_wins(tmp_path: Path) -> None:
    assert [winners(tmp_path / "run", 4) for _ in range(40)] == [1] * 40


def test_there_is_never_a_second_owner_while_others_come_and_go(tmp_path: Path) -> None:
    owners: list[int] = []
    most, held = [0], [0]
    deadline_s = time.monotonic() + 60

    def come_and_go() -> None:
        times = 0
        while times < 40 and time.monotonic() < deadline_s:
            try:
                with hold_run(tmp_path / "run"):
                    owners.append(1)
                    most[0], held[0] = max(most[0], len(owners)), held[0] + 1
                    owners.pop()
                    times += 1
            except InUseError:
                pass

    threads = [threading.Thread(target=come_and_go) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1]
    assert held == [160]
    assert list(tmp_path.rglob(LOCK_FILE)) == []


def leave_lock(folder: Path, **changes: object) -> Path:
    """The lock of an owner on another machine."""
    other = {"host": "node07", "boot": "another", "command": "pipekit train c.yaml", **changes}
    path = folder / LOCK_FILE
    with path.open("wb") as file:
        replace(Owner.of_this_process(), **other).write(file.fileno())  # type: ignore[arg-type]
    return path


@pytest.fixture
def on_shared_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_lock, "is_on_local_disk", lambda folder: False)
    monkeypatch.setattr(run_lock, "_SETTLE_S", 0.2)
    monkeypatch.setattr(run_lock, "_BEAT_S", 0.05)


@pytest.mark.usefixtures("on_shared_disk")
def test_an_owner_on_another_machine_counts_while_it_touches_its_lock(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lock = leave_lock(tmp_path)
    ended = threading.Event()

    def beat() -> None:
        while not ended.wait(0.05):
            lock.touch()

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        told = r"held by process \d+ on node07 since .* \(pipekit train c.yaml\)"
        with pytest.raises(InUseError, match=told), hold_run(tmp_path, stale_s=10):
            pass
    finally:
        ended.set()
        thread.join()
    started_s = time.monotonic()
    with hold_run(tmp_path, stale_s=0.3):
        assert time.monotonic() - started_s > 0.3
    assert capsys.readouterr().err.splitlines()[-1] == (
        f"{tmp_path}: was held by process {os.getpid()} on node07, which may still be there; waiting 0.3 s for a sign "
        "of it"
    )


@pytest.mark.usefixtures("on_shared_disk")
@pytest.mark.parametrize("changes", [{"boot": run_lock._boot()}, {"host": socket.gethostname()}])
def test_who_cannot_be_alive_is_not_waited_for(
    tmp_path: Path, changes: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An owner of this machine, whose lock is free, or of its start before this one."""
    if "host" in changes:
        monkeypatch.setattr(run_lock, "is_on_local_disk", lambda folder: True)
    leave_lock(tmp_path, **changes)
    started_s = time.monotonic()
    with hold_run(tmp_path):
        assert time.monotonic() - started_s < 10


@pytest.mark.usefixtures("on_shared_disk")
def test_without_flock_one_wins_and_is_respected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(*_: object) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(run_lock.fcntl, "flock", flock)
    assert [winners(tmp_path / "run", 3, stale_s=1) for _ in range(3)] == [1] * 3
    mine = f"held by process {os.getpid()} since"
    with hold_run(tmp_path), pytest.raises(InUseError, match=mine), hold_run(tmp_path, stale_s=5):
        pass


@pytest.mark.parametrize("content", [b"", b"\0" * 100, b"[]", b"5", b'{"pid": "x"}', b'{"host": 3}'])
def test_a_lock_that_names_nobody(tmp_path: Path, content: bytes) -> None:
    (tmp_path / LOCK_FILE).write_bytes(content)
    with hold_run(tmp_path):
        pass


def test_a_long_command_and_strange_characters_are_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["/bin/pipekit", "train", "ü\x1b[31m" * 500])
    with hold_run(tmp_path), pytest.raises(InUseError) as caught, hold_run(tmp_path):
        pass
    assert str(caught.value).isprintable()
    assert "(pipekit train " in str(caught.value)
    assert len(str(caught.value)) < 600
