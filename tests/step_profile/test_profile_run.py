"""A run with a section `profile`: its table and its files, and windows that are refused."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from pipekit.config import load_config
from pipekit.errors import ConfigError
from train_runs import pipekit, write_workspace

PAGE = Path(__file__).resolve().parents[2] / "docs" / "profiling.md"


@pytest.mark.slow
@pytest.mark.distributed
def test_a_run_shows_the_table_and_writes_the_files_of_the_page(tmp_path: Path) -> None:
    page = PAGE.read_text()
    command = re.search(r"^pipekit train examples/\S+ (.*)$", page, re.MULTILINE)
    assert command is not None
    overrides = [part for part in command[1].split() if not part.startswith("profile.start")]
    first = ["train", "c.yaml", "profile.start=1", *overrides, "profile.trace=true", "train.eval_interval=null"]
    workspace = write_workspace(tmp_path)
    done = pipekit(workspace, *first, "train.steps=4", "scheduler.decay_steps=12")
    assert done.returncode == 0, done.stderr
    assert "steps 2 to 4, mean milliseconds of a step by rank (files in runs/base/profile):" in done.stdout
    heading = re.search(r"^rank  begin.*$", page, re.MULTILINE)
    assert heading is not None
    assert heading[0].split() in [line.split() for line in done.stdout.splitlines()]
    written = {re.sub(r"\d+", "0", path.name) for path in (workspace / "runs/base/profile").iterdir()}
    told = set(re.findall(r"^\| `([a-z]+[-a-z0-9]*\.[a-z]+)`", page, re.MULTILINE))
    assert {re.sub(r"\d+", "0", name) for name in told} - written == {"memory-rank-0.pickle"}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("logging.profile=true", "here it is profile.steps"),
        ("profile.steps=5", r"measure until step 15, and train\.steps=12 are trained; try profile\.start=7, or"),
    ],
)
def test_what_cannot_be_profiled_is_told_with_what_to_type(tmp_path: Path, override: str, message: str) -> None:
    workspace = write_workspace(tmp_path)
    with pytest.raises(ConfigError, match=message):
        load_config(workspace / "c.yaml", [override])
