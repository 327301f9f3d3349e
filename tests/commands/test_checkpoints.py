"""`pipekit checkpoints`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from hand_made import random_model, write_checkpoint
from pipekit.cli import app
from pipekit.errors import CheckpointError


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run of three checkpoints."""
    config, tensors = random_model(num_layers=1)
    for step in (1, 2, 3):
        write_checkpoint(tmp_path, config, {name: tensor * step for name, tensor in tensors.items()}, step=step)
    (tmp_path / "checkpoints/latest").write_text("step-00000003\n")
    return tmp_path


def invoke(*arguments: object, exit_code: int = 0) -> str:
    result = CliRunner().invoke(app, ["checkpoints", *map(str, arguments)])
    if isinstance(result.exception, CheckpointError):
        raise result.exception
    assert result.exit_code == exit_code, result.output
    return result.output


def flip_last_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def test_the_list_shows_each_and_the_latest(run: Path) -> None:
    lines = invoke(run).splitlines()
    assert [line.split()[:2] for line in lines[1:]] == [[f"step-0000000{step}", f"{step}"] for step in (1, 2, 3)]
    assert [line.endswith("whole, latest") for line in lines[1:]] == [False, False, True]
    records: list[dict[str, Any]] = json.loads(invoke(run, "--json"))
    size = sum(file.stat().st_size for file in (run / "checkpoints/step-00000001").iterdir())
    assert (records[0]["step"], records[0]["bytes"], records[0]["faults"]) == (1, size, [])


def test_verify_names_the_damaged_tensor_and_fails(run: Path) -> None:
    assert invoke(run, "--verify").count("verified") == 3
    flip_last_bit(run / "checkpoints/step-00000002/weights-0000.safetensors")
    assert "damaged" not in invoke(run), "sizes alone are checked"
    output = invoke(run, "--verify", exit_code=1)
    assert output.count("verified") == 2
    assert "step-00000002/weights-0000.safetensors: damaged (weights of " in output


def test_a_missing_file_and_a_damaged_manifest_are_listed(run: Path) -> None:
    (run / "checkpoints/step-00000001/config.yaml").unlink()
    (run / "checkpoints/step-00000002/manifest.json").write_text("{")
    output = invoke(run)
    assert "step-00000001/config.yaml: is missing" in output
    assert "step-00000002/manifest.json: cut short or damaged" in output


def test_differences_by_step_name_and_path(run: Path) -> None:
    shown = invoke(run, "--diff", "1", "step-00000002")
    assert "embed" in shown
    assert shown == invoke(run / "checkpoints", "--diff", "step-00000001", run / "checkpoints/step-00000002")
    assert "the same, bit for bit" in invoke(run, "--diff", "1", "1")
    assert json.loads(invoke(run, "--diff", "1", "2", "--json"))[0]["relative"] == pytest.approx(1.0)
    with pytest.raises(CheckpointError, match=r"9: no such checkpoint .* one of step-00000001, "):
        invoke(run, "--diff", "1", "9")


def test_an_average_is_listed_but_not_the_latest(run: Path) -> None:
    assert "averaged step-00000002, step-00000003: " in invoke("average", run, "--last", "2")
    line = invoke(run).splitlines()[1]
    assert line.startswith("average-of-2-step-00000003  3 ")
    assert "average of step 2, 3" in line


def test_prune_says_what_it_would_remove_and_removes_it(run: Path) -> None:
    assert "would remove" in invoke("prune", run, "--keep", "2", "--dry-run")
    assert (run / "checkpoints/step-00000001").is_dir()
    assert invoke("prune", run, "--keep", "2").startswith("removed ")
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == [
        *("latest", "step-00000002", "step-00000003")
    ]
    with pytest.raises(CheckpointError, match="such as --keep 2"):
        invoke("prune", run)


def test_what_is_no_run_is_refused(tmp_path: Path, run: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        invoke(tmp_path / "empty")
    with pytest.raises(CheckpointError, match="or average, ema, prune or gather"):
        invoke("rename", run)
