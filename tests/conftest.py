"""Fixtures that all tests share, workers for all cores, and a check that nothing outlives a session."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
import uuid
from collections.abc import Iterator
from multiprocessing.util import Finalize
from pathlib import Path

import hypothesis
import pytest

import fork_server
from gloo_workers import MAX_THREADS, GlooWorkers

ROOT = Path(__file__).resolve().parents[1]
# What pytest, its plugins and the linters keep in the working tree.
CACHES = {".hypothesis", ".mypy_cache", ".pytest_cache", ".ruff_cache", "__pycache__", "pipekit.egg-info"}
# What multiprocessing removes at exit, and what torch and torchrun keep in the folder for temporary files.
OTHERS = ("pymp-", "torchelastic_", "torchinductor_")
SESSION = "PIPEKIT_TEST_SESSION"

# How long an example takes depends on what else the machine does.
hypothesis.settings.register_profile("untimed", deadline=None)
hypothesis.settings.load_profile("untimed")

if SESSION not in os.environ:
    # Inherited by the workers of pytest-xdist and by all that tests start: who has it belongs to this session.
    os.environ[SESSION] = uuid.uuid4().hex
    os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", tempfile.gettempdir())
    os.environ["TMPDIR"] = tempfile.mkdtemp(prefix="pipekit-tests-")
    tempfile.tempdir = None
    # After multiprocessing has removed its own folder in it.
    Finalize(None, shutil.rmtree, (os.environ["TMPDIR"], True), exitpriority=-200)


@pytest.fixture(scope="session", autouse=True)
def _fork_server() -> Iterator[None]:
    yield
    fork_server.stop()


@pytest.fixture(scope="session")
def gloo() -> GlooWorkers:
    """Ranks that talk over gloo, forked for one job after another."""
    return GlooWorkers()


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """One worker a core; none for a single file, as each has to import torch, nor for GPUs, which they would share."""
    if config.option.markexpr == "gpu":
        return 0
    paths = [Path(argument.split("::")[0]) for argument in config.args]
    if all(path.is_file() for path in paths):
        return 0
    return len(os.sched_getaffinity(0))


def pytest_sessionstart(session: pytest.Session) -> None:
    session.config.stash[_ENTRIES] = _entries()


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_sessionfinish(session: pytest.Session) -> Iterator[None]:
    yield
    leaks = []
    num_threads = len(os.listdir("/proc/self/task"))
    if num_threads > MAX_THREADS:
        leaks.append(f"{num_threads} threads in the process that ran the tests")
    if not hasattr(session.config, "workerinput"):
        leaks += [f"process {line}" for line in _processes_left()]
        leaks += [f"{path}" for path in Path(os.environ["TMPDIR"]).iterdir() if not path.name.startswith(OTHERS)]
        leaks += [f"{ROOT / name}" for name in sorted(_entries() - session.config.stash[_ENTRIES])]
    if leaks:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
        print("\nthe tests left behind:", *leaks, sep="\n  ")


_ENTRIES = pytest.StashKey[set[str]]()


def _entries() -> set[str]:
    """Names in the working tree's top folder, without caches."""
    return set(os.listdir(ROOT)) - CACHES


def _processes_left(patience_s: float = 60.0) -> list[str]:
    """Processes that this session started, whoever their parent is now, and that do not end soon by themselves."""
    deadline_s = time.monotonic() + patience_s
    while (left := _processes_of_session()) and time.monotonic() < deadline_s:
        time.sleep(0.2)
    return left


def _processes_of_session() -> list[str]:
    mark = f"{SESSION}={os.environ[SESSION]}".encode()
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        try:
            environ, command = (entry / "environ").read_bytes(), (entry / "cmdline").read_bytes()
        except OSError:
            continue
        # The resource tracker ends with this process.
        if mark in environ.split(b"\0") and b"multiprocessing.resource_tracker" not in command:
            found.append(f"{entry.name}: {command.replace(bytes(1), b' ').decode(errors='replace').strip()}")
    return found
