"""The benchmark of one GPU: its figures, the waits for the device in a step, and memory against the plan."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from gpu_workers import on_cpu, on_gpus

pytestmark = pytest.mark.distributed

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("device", "options"),
    [
        on_cpu("cpu", ["--quick", "--kernels", "--steps", "1", "--micro-batch-sizes", "1"], name="cpu"),
        on_gpus(1, "cuda", ["--kernels"], name="cuda"),
    ],
)
def test_the_benchmark_of_one_gpu(tmp_path: Path, device: str, options: list[str]) -> None:
    out = tmp_path / "gpu.json"
    done = subprocess.run(
        [sys.executable, "benchmarks/gpu.py", "--device", device, *options, "--json", str(out)],
        cwd=ROOT,
        # Layers are timed anew.
        env={**os.environ, "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=550,
    )
    assert done.returncode == 0, done.stderr + done.stdout
    report = json.loads(out.read_text())
    settings: list[dict[str, Any]] = report["settings"]
    ways = [(one["checkpointing"], one["compile"]) for one in settings]
    expected = (
        [(False, False), (True, False)]
        if device == "cpu"
        else [*[(False, False)] * 3, (True, False), *[(False, True)] * 3]
    )
    assert ways == expected
    for one in settings:
        assert one["step_s"] > 0
        assert one["predicted_step_s"] > 0
        tokens = one["micro_batch_size"] * 8 * (64 if device == "cpu" else 2048)
        assert one["tokens_per_s"] == pytest.approx(tokens / one["step_s"])
        assert one["mfu"] > 0
        assert one["planned_bytes"] == sum(one["planned_parts_bytes"].values())
    assert set(report["kernels"]) == {"head and loss, chunks", "accumulation", "copy of tokens", "half a block"}
    if device == "cuda":
        for one in settings:
            assert one["mfu"] < 1
            assert one["syncs"] <= 2
            assert one["allocated_bytes"] == pytest.approx(one["planned_bytes"], rel=0.1)
            assert one["reserved_bytes"] <= one["driver_bytes"]
