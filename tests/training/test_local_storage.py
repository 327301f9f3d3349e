"""Runs whose hosts share no folder."""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

import pytest

from gloo_workers import GlooWorkers, free_port
from hand_made import TEXT
from pipekit.checkpoint.overview import find_faults
from pipekit.config import parse_config
from pipekit.distributed.processes import leave_processes
from pipekit.errors import ConfigError
from pipekit.plan.resources import Resources
from pipekit.training.run import run_joining_rank

pytestmark = pytest.mark.distributed


def values(folder: Path, **sections: dict[str, Any]) -> dict[str, Any]:
    return {
        "run": {"dir": "run", "device": "cpu", "timeout_s": 60, "threads_per_process": 1},
        "model": {"hidden_size": 16, "num_layers": 2, "num_heads": 2, "max_positions": 16},
        "parallel": {"pp": 2},
        "data": {
            "source": str(folder / "text.txt"),
            "vocab_size": 280,
            "cache_dir": str(folder / "cache"),
            "validation_fraction": 0,
        },
        "train": {"steps": 4, "global_batch_size": 4, "sequence_length": 16, "precision": "fp32"},
        **sections,
    }


def start(rank: int, settings: dict[str, Any], steps: int, port: int) -> None:
    os.environ["MASTER_PORT"] = str(port)
    settings = {**settings, "train": {**settings["train"], "steps": steps}}
    config = parse_config(settings)
    resources = Resources(world_size=2, local_world_size=1)
    run_joining_rank(config, resources, rank=rank, local_rank=0, started_s=time.monotonic())


def run_job(rank: int, text: str, folders: list[str], ports: list[int]) -> str:
    leave_processes()
    os.chdir(folders[rank])
    local = values(Path(text), checkpoint={"storage": "local", "interval": 2, "keep": 1})
    start(rank, local, 4, ports[0])
    if rank == 0:
        shutil.rmtree("run")
    start(rank, local, 6, ports[1])
    said = ""
    try:
        start(rank, values(Path(text), checkpoint={"interval": 2}), 8, ports[2])
    except ConfigError as error:
        said = str(error)
    return said  # as one of the last run's processes


def test_a_run_goes_on_after_the_loss_of_a_host_and_hosts_that_share_nothing_unasked_are_refused(
    gloo: GlooWorkers, tmp_path: Path
) -> None:
    (tmp_path / "text.txt").write_text("".join(TEXT.replace("function", f"f_{index}") for index in range(200)))
    hosts = [tmp_path / f"host-{rank}" for rank in range(2)]
    for host in hosts:
        host.mkdir()
    for said in gloo.run(2, run_job, str(tmp_path), [str(host) for host in hosts], [free_port() for _ in range(3)]):
        assert "so they do not share it; give a folder that all hosts share, or keep checkpoints on the disks" in said
        assert said.endswith("with checkpoint.storage=local")
    for host in hosts:
        names = sorted(path.name for path in (host / "run/checkpoints").iterdir())
        assert names == ["latest", "step-00000006"]
        assert find_faults(host / "run/checkpoints/step-00000006") == []
        assert (host / "run/config.yaml").read_bytes() == (hosts[0] / "run/config.yaml").read_bytes()
        # Host 0 has lost those of its first start, and got them back.
        lines = (host / "run/metrics.jsonl").read_text().splitlines()
        assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
