"""Whole runs of `pipekit train` in a folder of their own, for tests."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from fork_server import run_pipekit


def write_workspace(folder: Path) -> Path:
    """Write a text, and the configuration `c.yaml` of a small run, into a folder, and return it."""
    words = ["def", "return", "class", "import", "for", "in", "range", "print", "yield", "while", "None", "self"]
    lines = [" ".join(words[(i * j + i // 3) % len(words)] for j in range(1, 9)) for i in range(3000)]
    (folder / "text.txt").write_text("\n".join(lines))
    config = {
        "run": {"dir": "runs/base", "timeout_s": 60},
        "model": {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "max_positions": 32, "dropout": 0.1},
        "parallel": {"pp": 2},
        "train": {
            "steps": 12,
            "global_batch_size": 8,
            "micro_batch_size": 2,
            "sequence_length": 32,
            "precision": "fp32",
            "eval_interval": 6,
            "eval_batches": 2,
            "check_replicas": 1,
        },
        "optimizer": {"lr": 3e-3},
        "scheduler": {"warmup_steps": 3},
        "data": {"source": "text.txt", "vocab_size": 300, "cache_dir": "cache"},
        "checkpoint": {"interval": 4, "keep": None},
    }
    (folder / "c.yaml").write_text(yaml.safe_dump(config))
    return folder


def pipekit(
    workspace: Path,
    *arguments: str,
    environ: dict[str, str] | None = None,
    timeout_s: float = 180,
    fork_ranks: bool = True,
) -> subprocess.CompletedProcess[str]:
    return run_pipekit(arguments, cwd=workspace, environ=environ, timeout_s=timeout_s, fork_ranks=fork_ranks)


def metrics(workspace: Path, run: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (workspace / run / "metrics.jsonl").read_text().splitlines()]


def losses(workspace: Path, run: str) -> list[float]:
    return [record["loss"] for record in metrics(workspace, run) if "loss" in record]


def ranks_of(run: str) -> list[str]:
    """The processes that train in a run folder."""
    listing = subprocess.run(["ps", "-eo", "pid,args"], capture_output=True, text=True, check=True).stdout
    return [line for line in listing.splitlines() if "pipekit.launch.rank" in line and f"{run}/plan.json" in line]


def wait_for(condition: Callable[[], object], what: str, timeout_s: float = 120.0) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s, f"{what} did not happen within {timeout_s:g} s"
        time.sleep(0.05)
