"""The processes in which tests run end with their job, and what goes wrong in one of them is said."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from fork_server import run_pipekit
from gloo_workers import MAX_THREADS, GlooWorkers, RankError

pytestmark = pytest.mark.distributed


def process_id(rank: int) -> int:
    return os.getpid()


def test_every_job_has_processes_of_its_own_that_end_with_it(gloo: GlooWorkers) -> None:
    before, after = gloo.run(2, process_id), gloo.run(2, process_id)
    assert len({*before, *after, os.getpid()}) == 5
    for number in (*before, *after):
        with pytest.raises(ProcessLookupError):
            os.kill(number, 0)


def fail_on_last(rank: int, threads: int) -> None:
    if rank == 1:
        assert threads, "no threads were asked for"
        for _ in range(threads):
            threading.Thread(target=threading.Event().wait, daemon=True).start()


@pytest.mark.parametrize(
    ("threads", "message"),
    [(0, "rank 1:(.|\n)*AssertionError: no threads were asked for"), (MAX_THREADS, r"rank 1 has \d+ threads")],
)
def test_a_rank_that_fails_or_has_too_many_threads_is_named(gloo: GlooWorkers, threads: int, message: str) -> None:
    with pytest.raises(RankError, match=message):
        gloo.run(2, fail_on_last, threads)


@pytest.mark.parametrize("arguments", [["--version"], ["train", "none.yaml"]])
def test_a_forked_command_says_what_a_started_one_does(tmp_path: Path, arguments: list[str]) -> None:
    forked = run_pipekit(arguments, cwd=tmp_path)
    started = subprocess.run(
        [sys.executable, "-m", "pipekit", *arguments], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert (forked.returncode, forked.stdout, forked.stderr) == (started.returncode, started.stdout, started.stderr)


def test_a_command_that_takes_too_long_is_ended(tmp_path: Path) -> None:
    with pytest.raises(subprocess.TimeoutExpired):
        run_pipekit(["--version"], cwd=tmp_path, timeout_s=0.0)
