"""Reports of failing workers, which run in processes of their own, because a report ends the process."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipekit.errors import CommunicationError, ConfigError
from pipekit.launch.failures import FailureReport
from pipekit.launch.worker import error_file_from, failure_kind


def run_block(block: str, error_file: Path | None) -> subprocess.CompletedProcess[str]:
    path = None if error_file is None else str(error_file)
    script = "\n".join(
        [
            "import atexit, os, pathlib, sys, threading, time",
            "from pipekit.errors import *",
            "from pipekit.launch.worker import report_failure",
            f"path = {path!r}",
            "with report_failure(path and pathlib.Path(path)):",
            *("    " + line for line in block.splitlines()),
            "print('after')",
        ]
    )
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize(
    ("block", "kind", "message", "exit_code"),
    [
        ("raise ConfigError('train.steps=0: type 1')", "user", "train.steps=0: type 1", 2),
        ("raise CommunicationError('rank 1 is gone')", "peer", "rank 1 is gone", 3),
        ("raise ValueError('bad')", "crash", "ValueError: bad", 3),
        ("raise RuntimeError('[x/gloo/transport/pair.cc:5] closed')", "peer", None, 3),
        ("raise RuntimeError('Application timeout caused pair closure')", "peer", None, 3),
        ("raise OSError(28, 'No space left')", "user", "a file: cannot be written: the disk is full; make room", 5),
        ("sys.exit(7)", "crash", "SystemExit: 7", 7),
        ("sys.exit('no')", "crash", "SystemExit: no", 3),
    ],
)
def test_a_failure_is_written_down(tmp_path: Path, block: str, kind: str, message: str | None, exit_code: int) -> None:
    error_file = tmp_path / "rank-0.error.json"
    before_s = time.time()
    ended = run_block(block, error_file)
    report = FailureReport.read(error_file)
    assert ended.returncode == exit_code
    assert report is not None
    assert report.kind == kind
    assert report.message.startswith(message or "")
    assert before_s <= report.time_s <= time.time()
    assert report.traceback == ended.stderr
    assert report.traceback.startswith("Traceback (most recent call last)")
    assert "after" not in ended.stdout
    assert list(tmp_path.iterdir()) == [error_file]


def test_the_process_ends_although_its_cleanup_hangs(tmp_path: Path) -> None:
    hang = "threading.Thread(target=time.sleep, args=(300,)).start()\natexit.register(time.sleep, 300)\n"
    started_s = time.monotonic()
    ended = run_block(f"{hang}print('seen', end='')\nraise ValueError('bad')", tmp_path / "error.json")
    assert (ended.returncode, ended.stdout) == (3, "seen")
    assert time.monotonic() - started_s < 30


@pytest.mark.parametrize("block", ["print('inside')", "sys.exit(0)", "sys.exit()"])
def test_success_is_left_alone(tmp_path: Path, block: str) -> None:
    ended = run_block(block, tmp_path / "error.json")
    assert (ended.returncode, ended.stderr) == (0, "")
    assert ("after" in ended.stdout) == (block == "print('inside')")
    assert list(tmp_path.iterdir()) == []


def test_an_interrupt_ends_quietly(tmp_path: Path) -> None:
    ended = run_block("raise KeyboardInterrupt", tmp_path / "error.json")
    assert (ended.returncode, ended.stderr) == (130, "")
    assert list(tmp_path.iterdir()) == []


def test_without_a_launcher_of_ours_a_users_error_is_its_message() -> None:
    ended = run_block("raise ConfigError('train.steps=0: type 1')", None)
    assert (ended.returncode, ended.stderr) == (2, "train.steps=0: type 1\n")


def test_a_report_that_cannot_be_written_still_ends_the_process(tmp_path: Path) -> None:
    assert run_block("raise ValueError('bad')", tmp_path / "missing" / "error.json").returncode == 3


def test_failure_kind_knows_torch_by_name() -> None:
    dist_error = type("DistError", (RuntimeError,), {"__module__": "torch.distributed"})
    network_error = type("DistNetworkError", (dist_error,), {"__module__": "torch.distributed"})
    foreign = type("DistError", (RuntimeError,), {"__module__": "elsewhere"})
    assert failure_kind(network_error("recvValue failed: Connection reset by peer")) == "peer"
    assert failure_kind(network_error("failed to listen. port: 29500, name: EADDRINUSE")) == "crash"
    assert failure_kind(foreign("x")) == "crash"
    assert failure_kind(BrokenPipeError("the terminal is gone")) == "crash"
    assert failure_kind(ConfigError("x")) == "user"
    assert failure_kind(CommunicationError("x")) == "peer"


def test_error_file_from_the_environment() -> None:
    assert error_file_from({"PIPEKIT_ERROR_FILE": "/x/rank-0.error.json"}) == Path("/x/rank-0.error.json")
    assert error_file_from({}) is None
