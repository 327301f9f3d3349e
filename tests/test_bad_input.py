"""Mistakes of a user's: one message, exit code 2, no traceback, nothing written."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest
import yaml

from fork_server import run_pipekit
from pipekit.run_lock import hold_run

CONFIG = {
    "model": {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "max_positions": 32},
    "train": {"steps": 2, "global_batch_size": 4, "micro_batch_size": 1, "sequence_length": 32, "precision": "fp32"},
    "data": {"source": "text.txt", "vocab_size": 300, "cache_dir": "cache"},
}


@pytest.fixture
def workspace(tmp_path: Path) -> Path:
    (tmp_path / "text.txt").write_text("\n".join(f"line {i} of {i * i}" for i in range(2000)))
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(CONFIG))
    return tmp_path


def refuse(workspace: Path, *arguments: str, environ: dict[str, str] | None = None, exit_code: int = 2) -> str:
    """Run a command that must be refused, and return its message."""
    before = {path for path in workspace.rglob("*") if "cache" not in path.parts}
    done = run_pipekit(arguments, cwd=workspace, environ=environ)
    assert done.returncode == exit_code, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.count("error:") <= 1
    assert {path for path in workspace.rglob("*") if "cache" not in path.parts} == before
    return done.stderr


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (["train.setps=3"], ["command line: train.setps=3", "unknown key", "did you mean 'train.steps'"]),
        (["train.steps=ten"], ["command line: train.steps=ten", "whole number"]),
        (["parallel.pp=9"], ["parallel.pp=9", "8 layers", "try parallel.pp=8"]),
        (["model.num_heads=5"], ["model.num_heads=5 does not divide model.hidden_size=32", "try"]),
        (["parallel.pp=2", "parallel.zero=2"], ["parallel.zero=2", "parallel.pp=2", "try parallel.zero=1"]),
        (["parallel.pp=2", "parallel.zero=3"], ["parallel.zero=3", "try parallel.zero=1, or parallel.pp=1"]),
        (["train.global_batch_size=5", "train.micro_batch_size=2"], ["train.global_batch_size=5", "try"]),
        (
            ["parallel.zero=1", "deepspeed.zero_optimization.stage=2"],
            ["deepspeed.zero_optimization.stage=2 asks for parallel.zero=2", "parallel.zero=1 is given"],
        ),
        (["deepspeed.zero_optimisation={}"], ["did you mean 'deepspeed.zero_optimization'"]),
        (["run.device=cuda"], ["run.device=cuda", "run.device=cpu"]),
    ],
)
def test_a_wrong_configuration(workspace: Path, overrides: list[str], parts: list[str]) -> None:
    if overrides == ["run.device=cuda"] and Path("/proc/driver/nvidia").exists():
        pytest.skip("this machine has a GPU")
    message = refuse(workspace, "train", "c.yaml", *overrides)
    for part in parts:
        assert part in message


def test_an_unknown_key_in_the_file_has_its_line(workspace: Path) -> None:
    (workspace / "bad.yaml").write_text("model: {preset: tiny}\ntrain:\n  steps: 3\n  lr: 0.1\n")
    message = refuse(workspace, "train", "bad.yaml")
    assert message.startswith("error: bad.yaml:4: train.lr")
    assert "optimizer.lr" in message


def test_a_missing_configuration(workspace: Path) -> None:
    assert "did you mean 'c.yaml'" in refuse(workspace, "train", "cc.yaml")


def test_a_missing_text(workspace: Path) -> None:
    assert "data.source='no.txt'" in refuse(workspace, "train", "c.yaml", "data.source=no.txt")


def test_an_empty_text(workspace: Path) -> None:
    (workspace / "empty.txt").write_text("")
    assert "empty.txt" in refuse(workspace, "train", "c.yaml", "data.source=empty.txt")


def test_a_vocabulary_smaller_than_the_tokenizers(workspace: Path) -> None:
    message = refuse(workspace, "train", "c.yaml", "model.vocab_size=280")
    assert "model.vocab_size=280 is smaller than the tokenizer's 300" in message
    assert "try model.vocab_size=300" in message


def test_degrees_that_are_not_the_world_size(workspace: Path) -> None:
    environ = {"RANK": "0", "WORLD_SIZE": "3", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29999"}
    done = run_pipekit(["train", "c.yaml", "parallel.pp=2"], cwd=workspace, environ=environ)
    assert done.returncode == 2
    assert "does not divide 3" in done.stderr
    assert "try parallel.pp=1 or 3" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_run_folder_that_another_process_holds(workspace: Path) -> None:
    (workspace / "trial.yaml").write_text("trial: mine:Mine\nfit: {max_length: {batches: 1}}\n")
    methods = "train_batch = build_training_data_loader = lambda self, *_: None"
    (workspace / "mine.py").write_text(f"from pipekit import Trial\n\nclass Mine(Trial):\n    {methods}\n")
    place = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    with hold_run(workspace / "runs/c"), hold_run(workspace / "runs/trial"):
        (workspace / "runs/c/logs").mkdir()
        (workspace / "runs/c/logs/rank-0.log").touch()  # ranks of another launcher append to it
        starts = [("c.yaml", {}), ("c.yaml", place), ("trial.yaml", {})]
        for config, environ in starts:
            message = refuse(workspace, "train", config, environ=environ, exit_code=7)
            assert f"runs/{config.removesuffix('.yaml')}: is held by process {os.getpid()} since" in message


def test_an_occupied_port(workspace: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
        environ = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        done = run_pipekit(["train", "c.yaml"], cwd=workspace, environ=environ)
    assert done.returncode == 2
    assert "another program uses its port" in done.stderr
    assert port in done.stderr
    assert "Traceback" not in done.stderr


def test_a_run_folder_of_another_configuration(workspace: Path) -> None:
    run = workspace / "runs/c"
    run.mkdir(parents=True)
    other = {**CONFIG, "model": {**CONFIG["model"], "num_layers": 3}, "run": {"dir": "runs/c"}}
    (run / "config.yaml").write_text(yaml.safe_dump(other))
    checkpoint = run / "checkpoints/step-00000001"
    checkpoint.mkdir(parents=True)
    (checkpoint / "manifest.json").touch()
    message = refuse(workspace, "train", "c.yaml")
    assert "run.dir=runs/c holds a run of another configuration: model.num_layers differs" in message


def test_a_checkpoint_cut_short(workspace: Path) -> None:
    checkpoint = workspace / "runs/c/checkpoints/step-00000001"
    checkpoint.mkdir(parents=True)
    (checkpoint / "manifest.json").write_text('{"format": "pipekit-checkpoint", "version": 1, "train')
    assert "manifest.json: cut short or damaged" in refuse(workspace, "train", "c.yaml")


def test_no_checkpoint_to_export_or_sample(workspace: Path) -> None:
    assert "no such folder" in refuse(workspace, "export", "runs/none", "out")
    assert "no such folder" in refuse(workspace, "generate", "runs/none")
    assert "holds no checkpoint" in refuse(workspace, "export", ".", "out")
