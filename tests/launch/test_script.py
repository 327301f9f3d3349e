"""`pipekit launch`: a script of one's own in several processes, its arguments, its end and its failures."""

from __future__ import annotations

from pathlib import Path

import pytest

from fork_server import run_pipekit
from pipekit.errors import LaunchError
from pipekit.launch.script import launch_script

pytestmark = pytest.mark.distributed

# Sums the ranks' numbers, and fails as its first argument says.
SCRIPT = """
import os, pathlib, sys, time
import torch.distributed as dist
import beside

if __name__ == "__main__":
    rank = int(os.environ["RANK"])
    if sys.argv[1:] == ["--fail"]:
        if rank == 1:
            raise ZeroDivisionError("rank 1 divides by zero")
        time.sleep(300)
    if sys.argv[1:] == ["--exit"]:
        sys.exit(3 * rank)
    dist.init_process_group("gloo")
    everyones = [None] * dist.get_world_size()
    dist.all_gather_object(everyones, 10 + rank)
    print(everyones, sys.argv, __file__, beside.NAME, os.environ["DS_ACCELERATOR"])
    dist.destroy_process_group()
"""


@pytest.fixture
def workspace(tmp_path: Path) -> Path:
    (tmp_path / "scripts").mkdir()
    (tmp_path / "scripts" / "own.py").write_text(SCRIPT)
    (tmp_path / "scripts" / "beside.py").write_text("NAME = 'beside'")
    return tmp_path


def test_a_script_runs_in_several_processes_with_its_own_arguments(workspace: Path) -> None:
    arguments = ["--processes", "2", "--device", "cpu", "scripts/own.py", "--processes", "7", "--its-own", "x y"]
    done = run_pipekit(["launch", *arguments], cwd=workspace)
    assert done.returncode == 0, done.stderr
    given = ["scripts/own.py", "--processes", "7", "--its-own", "x y"]
    assert done.stdout == f"starting 2 processes ...\n[10, 11] {given} scripts/own.py beside cpu\n"
    assert f"[10, 11] {given}" in (workspace / "runs/own/logs/rank-1.log").read_text()


def test_the_first_failure_ends_all_and_is_told_once(workspace: Path) -> None:
    done = run_pipekit(["launch", "-n", "2", "--log-dir", "logs", "scripts/own.py", "--fail"], cwd=workspace)
    assert done.returncode == 3
    assert done.stderr.startswith("error: rank 1 failed: ZeroDivisionError: rank 1 divides by zero\n")
    assert done.stderr.count("ZeroDivisionError: rank 1") == 2  # the message, and the end of its traceback
    assert "the whole log of rank 1: " in done.stderr
    assert "scripts/own.py" in (workspace / "logs/rank-1.log").read_text()


def test_an_exit_code_of_the_script_is_a_failure(workspace: Path) -> None:
    done = run_pipekit(["launch", "-n", "2", "scripts/own.py", "--exit"], cwd=workspace)
    assert done.returncode == 3
    assert done.stderr.startswith("error: rank 1 failed: SystemExit: 3\n")


def test_a_script_that_is_not_there_and_a_launch_within_a_launch_are_refused(
    workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(LaunchError, match=r"nowhere.py: no such file; give the path of a Python script"):
        launch_script(workspace / "nowhere.py", [])
    for name, value in {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
        "MASTER_ADDR": "x",
        "MASTER_PORT": "1",
    }.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(LaunchError, match="is already one that torchrun has started; leave it out, as in torchrun "):
        launch_script(workspace / "scripts/own.py", [])
