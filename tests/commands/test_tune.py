"""`pipekit tune lr`, as a command."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from fork_server import run_pipekit
from train_runs import write_workspace


def test_what_is_no_part_of_the_command_says_what_to_type(tmp_path: Path) -> None:
    done = run_pipekit(["tune", "c.yaml"], cwd=tmp_path)
    assert done.returncode != 0
    assert "say what to tune, and the file: pipekit tune lr config.yaml" in done.stderr


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
