"""Stops on request of whole runs: by `run.max_time`, and by signals that other launchers pass on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from fork_server import run_pipekit
from gloo_workers import free_port
from pipekit.checkpoint.manifest import load_manifest, resolve_checkpoint

pytestmark = [pytest.mark.distributed, pytest.mark.slow]


@pytest.fixture
def workspace(tmp_path: Path) -> Path:
    """A folder with a run of two stages that takes hours."""
    (tmp_path / "text.txt").write_text("\n".join(f"line {number} of the text" for number in range(3000)))
    config = {
        "run": {"dir": "run", "timeout_s": 60},
        "model": {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "max_positions": 32},
        "parallel": {"pp": 2},
        "train": {"steps": 10**6, "global_batch_size": 4, "micro_batch_size": 2, "sequence_length": 32},
        "data": {"source": "text.txt", "vocab_size": 300, "cache_dir": "cache"},
    }
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(config))
    return tmp_path


def check_stopped(workspace: Path) -> None:
    """Check that the newest checkpoint is of the last step, and that a second start takes every later one once."""
    manifest = load_manifest(resolve_checkpoint(workspace / "run"))
    last = manifest.training.step
    assert trained_steps(workspace) == list(range(1, last + 1))
    more = run_pipekit(["train", "c.yaml", f"train.steps={last + 3}"], cwd=workspace)
    assert more.returncode == 0, more.stderr
    assert f"going on after step {last}" in more.stdout
    assert trained_steps(workspace) == list(range(1, last + 4))


def trained_steps(workspace: Path) -> list[int]:
    records = [json.loads(line) for line in (workspace / "run/metrics.jsonl").read_text().splitlines()]
    return [record["step"] for record in records if "loss" in record]


def test_a_run_stops_when_its_time_is_over(workspace: Path) -> None:
    done = run_pipekit(["train", "c.yaml", "run.max_time=40s"], cwd=workspace)
    assert done.returncode == 75, done.stderr
    assert "stopped by run.max_time after step " in done.stderr
    check_stopped(workspace)


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_torchrun_passes_a_signal_on_and_waits_for_the_save(workspace: Path, signum: int) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={free_port()}"]
    with subprocess.Popen(
        [*command, "-m", "pipekit", "train", "c.yaml"],
        cwd=workspace,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as launcher:
        deadline_s = time.monotonic() + 120
        while not (workspace / "run/metrics.jsonl").exists() or len(trained_steps(workspace)) < 5:
            assert launcher.poll() is None, launcher.stderr.read() if launcher.stderr else ""
            assert time.monotonic() < deadline_s, "no step was trained within 120 s"
            time.sleep(0.1)
        launcher.send_signal(signum)
        stderr = launcher.communicate(timeout=180)[1]
    assert launcher.returncode != 0
    assert f"stopped by {signal.Signals(signum).name} after step " in stderr
    check_stopped(workspace)
