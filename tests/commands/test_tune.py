"""`pipekit tune`, as a command."""

from __future__ import annotations

import json
import os
import re
import signal
import time
from pathlib import Path

import pytest

from fork_server import StartedCommand, run_pipekit
from pipekit.config import load_config
from train_runs import write_workspace


def test_what_is_no_part_of_the_command_says_what_to_type(tmp_path: Path) -> None:
    done = run_pipekit(["tune", "lr"], cwd=tmp_path)
    assert done.returncode != 0
    assert "give the file: pipekit tune config.yaml, or pipekit tune lr config.yaml" in done.stderr


@pytest.mark.distributed
@pytest.mark.slow
def test_the_configuration_that_is_found_trains(tmp_path: Path) -> None:
    folder = write_workspace(tmp_path)
    fixed = ["--fix", "train.activation_checkpointing=false", "--fix", "parallel.zero=0"]
    arguments = ["tune", "c.yaml", "--devices", "2", "--runs", "3", "--steps", "2", *fixed, "--json", "-o", "best.yaml"]
    done = run_pipekit(arguments, cwd=folder)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    measured = [row for row in report["candidates"] if row["measured_s"] is not None]
    assert report["num_runs"] == 3
    assert report["best"]["measured_s"] == min(row["measured_s"] for row in measured)
    assert not (folder / "runs").exists()
    found = load_config(folder / "best.yaml")
    base = load_config(folder / "c.yaml")
    chosen = report["best"]["changes"]
    assert (found.data, found.model) == (base.data, base.model)
    assert (found.parallel.pp, found.parallel.dp) == (chosen["parallel.pp"], chosen["parallel.dp"])
    assert found.train.global_batch_size == base.train.global_batch_size
    done = run_pipekit(["train", "best.yaml", "train.steps=2"], cwd=folder)
    assert done.returncode == 0, done.stderr


@pytest.mark.distributed
@pytest.mark.slow
def test_an_interrupted_search_shows_what_it_knows_and_leaves_nothing(tmp_path: Path) -> None:
    folder = write_workspace(tmp_path)
    output = tmp_path / "output"
    output.mkdir()
    own = tmp_path / "temporary"
    own.mkdir()
    arguments = ["pipekit", "tune", "c.yaml", "--devices", "2", "--runs", "50", "--steps", "3"]
    started = StartedCommand(arguments, cwd=folder, output=output, environ={"TMPDIR": str(own)})
    deadline_s = time.monotonic() + 100
    while "run 2: " not in started.stderr and time.monotonic() < deadline_s:
        time.sleep(0.05)
    os.kill(started.pid, signal.SIGINT)
    done = started.wait(30)
    assert done.returncode == 128 + signal.SIGINT, done.stderr
    assert "interrupted; written to tuned.yaml" in done.stdout
    assert "best" in done.stdout
    assert not list(own.glob("pipekit-tune-*"))
    load_config(folder / "tuned.yaml")


@pytest.mark.distributed
@pytest.mark.slow
def test_a_range_test_trains_under_the_layout_of_the_run_and_suggests_a_rate(tmp_path: Path) -> None:
    folder = write_workspace(tmp_path)
    arguments = ["tune", "lr", "c.yaml", "--from", "1e-4", "--to", "10", "--steps", "30", "run.dir=runs/tuned"]
    done = run_pipekit(arguments, cwd=folder)
    assert done.returncode == 0, done.stderr
    suggested = re.search(r"suggestion: optimizer\.lr=(\S+), which is the rate at which", done.stdout)
    assert suggested is not None, done.stdout
    assert 1e-4 < float(suggested[1]) < 1
    assert "falls most steeply" in done.stdout
    assert {path.name for path in (folder / "runs/tuned").iterdir()} == {"lr-range"}
    assert (folder / "runs/tuned/lr-range/lr-range.png").is_file()
    assert not (folder / "runs/tuned/lr-range/checkpoints").exists()
