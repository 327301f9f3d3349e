"""Locks that a killed build leaves behind."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipekit.errors import LaunchError
from pipekit.launch import extensions
from pipekit.launch.extensions import extensions_dir, guard_extension_builds

# As torch's FileBaton takes it.
BUILDER = """
import os, sys, time
descriptor = os.open(sys.argv[1], os.O_CREAT | os.O_EXCL)
print("locked", flush=True)
time.sleep(float(sys.argv[2]))
os.close(descriptor)
os.remove(sys.argv[1])
"""


@pytest.fixture
def lock(tmp_path: Path) -> Path:
    (tmp_path / "cpu_adam").mkdir()
    return tmp_path / "cpu_adam" / "lock"


@pytest.fixture
def builders() -> Iterator[list[subprocess.Popen[str]]]:
    started: list[subprocess.Popen[str]] = []
    yield started
    for process in started:
        process.kill()
        process.communicate()


def start_builder(lock: Path, builders: list[subprocess.Popen[str]], *, seconds: float) -> int:
    command = [sys.executable, "-c", BUILDER, str(lock), str(seconds)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    builders.append(process)
    assert process.stdout is not None
    assert process.stdout.readline() == "locked\n"
    return process.pid


def guard(lock: Path, *, stale_after_s: float = 3600, limit_s: float = 0.5) -> list[str]:
    environ = {"TORCH_EXTENSIONS_DIR": str(lock.parent.parent)}
    return guard_extension_builds(environ, stale_after_s=stale_after_s, limit_s=limit_s)


@pytest.fixture
def everything_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Judge by the processes, whatever file system or container the tests run in."""
    if sys.platform != "linux":
        pytest.skip("only Linux lists the open files of processes")
    monkeypatch.setattr(extensions, "_sees_every_builder", lambda lock: True)


@pytest.fixture
def nothing_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extensions, "_sees_every_builder", lambda lock: False)


def test_a_folder_without_locks_is_left_alone(tmp_path: Path, lock: Path) -> None:
    assert guard(lock) == []
    assert guard_extension_builds({"TORCH_EXTENSIONS_DIR": str(tmp_path / "missing")}) == []


@pytest.mark.usefixtures("everything_is_seen")
def test_the_lock_of_a_killed_build_is_removed_however_young(lock: Path, builders: list[subprocess.Popen[str]]) -> None:
    start_builder(lock, builders, seconds=300)
    builders[0].kill()
    builders[0].wait()
    (source,) = [lock.parent / "build.ninja"]
    source.write_text("")
    (note,) = guard(lock)
    assert str(lock) in note
    assert list(lock.parent.iterdir()) == [source]


@pytest.mark.usefixtures("everything_is_seen")
def test_the_lock_of_a_live_build_is_kept_however_old(lock: Path, builders: list[subprocess.Popen[str]]) -> None:
    pid = start_builder(lock, builders, seconds=300)
    os.utime(lock, (0, 0))
    started_s = time.monotonic()
    with pytest.raises(LaunchError) as caught:
        guard(lock, stale_after_s=0)
    assert 0.5 <= time.monotonic() - started_s < 20
    assert lock.exists()
    assert f"held by process {pid}," in str(caught.value)
    assert str(caught.value).endswith(f"rm {lock}")


@pytest.mark.usefixtures("everything_is_seen")
def test_a_live_build_is_waited_for(lock: Path, builders: list[subprocess.Popen[str]]) -> None:
    start_builder(lock, builders, seconds=1)
    assert guard(lock, limit_s=60) == []
    assert builders[0].wait(10) == 0  # it found its own lock to remove


@pytest.mark.usefixtures("everything_is_seen")
def test_a_ninja_that_outlived_its_builder_is_waited_for(
    tmp_path: Path, lock: Path, builders: list[subprocess.Popen[str]]
) -> None:
    lock.touch()
    ninja = tmp_path / "ninja"
    ninja.write_text("#!/bin/sh\necho started\nsleep 1\nexit 0\n")
    ninja.chmod(0o755)
    # A script's process bears the script's name; a shell that merely stands in the folder holds nothing.
    builders.append(subprocess.Popen([str(ninja)], cwd=lock.parent, stdout=subprocess.PIPE, text=True))
    builders.append(subprocess.Popen(["/bin/sleep", "300"], cwd=lock.parent, stdout=subprocess.PIPE, text=True))
    assert builders[0].stdout is not None
    assert builders[0].stdout.readline() == "started\n"
    assert len(guard(lock, limit_s=60)) == 1
    assert builders[0].poll() == 0
    assert builders[1].poll() is None


@pytest.mark.usefixtures("nothing_is_seen")
def test_a_builder_out_of_sight_is_judged_by_age(lock: Path) -> None:
    lock.touch()
    output = lock.parent / "adam.o"
    output.touch()
    os.utime(lock, (0, 0))
    os.utime(lock.parent, (0, 0))
    with pytest.raises(LaunchError, match="cannot be seen from here") as caught:
        guard(lock)  # its compiler has just written something
    assert str(caught.value).endswith(f"type: rm {lock}")
    assert lock.exists()
    os.utime(output, (0, 0))
    assert len(guard(lock)) == 1
    assert not lock.exists()


@pytest.mark.usefixtures("everything_is_seen")
def test_a_lock_that_cannot_be_removed_is_named(lock: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lock.touch()

    def refuse(path: Path, missing_ok: bool = False) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "unlink", refuse)
    with pytest.raises(LaunchError, match=r"cannot be removed \(Permission denied\)"):
        guard(lock)


def test_the_users_own_folder_wins() -> None:
    assert extensions_dir({"TORCH_EXTENSIONS_DIR": "/scratch/ext", "HOME": "/h"}) == Path("/scratch/ext")


def test_each_environment_has_a_folder_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    environ = {"XDG_CACHE_HOME": "/c", "HOME": "/h"}
    first = extensions_dir(environ)
    assert first.parent == Path("/c/torch_extensions")
    assert extensions_dir({"HOME": "/h"}).name == first.name
    assert extensions_dir({"HOME": "/h"}).is_relative_to("/h")
    monkeypatch.setattr(sys, "prefix", "/another/environment")
    assert extensions_dir(environ) != first
