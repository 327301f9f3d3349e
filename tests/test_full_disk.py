"""Whole runs on a disk that is full, or becomes so, which is a small file system in memory."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from fork_server import run_pipekit
from pipekit.checkpoint.manifest import find_latest, list_checkpoints
from pipekit.checkpoint.overview import find_faults

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

TRIAL = """
import os
from pathlib import Path
from pipekit.training.language_model import LanguageModelTrial
from pipekit.training.trial_callbacks import TrialCallback

FILLER = Path("disk/filler")


class Filling(TrialCallback):
    def on_metrics(self, step, metrics):
        if step == 3:
            with FILLER.open("wb") as file:
                try:
                    while True:
                        os.write(file.fileno(), bytes(4096))
                except OSError:
                    pass
        if step == 30:
            FILLER.unlink()
        print("chatter of step", step, "." * 500)


class FillingTrial(LanguageModelTrial):
    def build_callbacks(self):
        return [Filling()]
"""


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 12 MB; a checkpoint of the model takes 3 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=12m", "none", str(folder)], capture_output=True)
    if mounted.returncode:
        pytest.skip("mount is not permitted")
    (tmp_path / "text.txt").write_text("\n".join(f"def f{i}(x): return x + {i * i}" for i in range(3000)))
    config = {
        "run": {"dir": "disk/run", "timeout_s": 60},
        "model": {"hidden_size": 64, "num_layers": 4, "num_heads": 4, "max_positions": 32},
        "parallel": {"pp": 2},
        "train": {"steps": 40, "global_batch_size": 4, "micro_batch_size": 2, "sequence_length": 32},
        "data": {"source": "text.txt", "vocab_size": 300, "cache_dir": "cache"},
    }
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(config))
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def fill(disk: Path, *, leave: int) -> None:
    found = os.statvfs(disk)
    (disk / "filler").write_bytes(bytes(found.f_bavail * found.f_frsize - leave))


def test_a_disk_that_is_full_before_the_start(disk: Path) -> None:
    fill(disk, leave=0)
    done = run_pipekit(["train", "c.yaml"], cwd=disk.parent)
    assert (done.returncode, done.stdout) == (5, "")
    assert "error: run.dir=disk/run: cannot be written: the disk is full" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert [path.name for path in disk.iterdir()] == ["filler"]


@pytest.mark.parametrize("in_background", [False, True])
def test_a_disk_that_is_full_while_a_checkpoint_is_written(disk: Path, in_background: bool) -> None:
    settings = ["checkpoint.interval=5", "checkpoint.keep=null", f"checkpoint.async={str(in_background).lower()}"]
    done = run_pipekit(["train", "c.yaml", *settings], cwd=disk.parent)
    assert done.returncode == 5
    assert "cannot be written: the disk is full" in done.stderr
    assert "Traceback" not in done.stderr
    folder = disk / "run" / "checkpoints"
    assert 2 <= len(list_checkpoints(folder)) <= 4
    latest = find_latest(folder)
    assert latest == list_checkpoints(folder)[-1]
    assert find_faults(latest) == []
    assert [path.name for path in folder.iterdir() if path.name.startswith(".")] == []


@pytest.mark.parametrize("in_background", [False, True])
def test_a_run_that_goes_on_while_the_disk_is_full(disk: Path, in_background: bool) -> None:
    (disk.parent / "filling.py").write_text(TRIAL)
    settings = ["checkpoint.interval=2", "checkpoint.on_error=warn", f"checkpoint.async={str(in_background).lower()}"]
    settings.append("run.trial=filling:FillingTrial")
    done = run_pipekit(["train", "c.yaml", *settings], cwd=disk.parent, environ={"PYTHONPATH": str(disk.parent)})
    assert done.returncode == 0, done.stderr
    assert "cannot be written: the disk is full" in done.stdout
    # In the background, the first may still be on its way to the disk when that is filled.
    assert in_background or "the newest checkpoint is disk/run/checkpoints/step-00000002" in " ".join(
        done.stdout.split()
    )
    folder = disk / "run/checkpoints"
    assert [path.name for path in sorted(folder.iterdir())] == ["latest", "step-00000038", "step-00000040"]
    assert find_faults(find_latest(folder) or Path()) == []


def test_a_disk_that_is_full_while_metrics_are_written(disk: Path) -> None:
    (disk.parent / "filling.py").write_text(TRIAL)
    settings = ["run.trial=filling:FillingTrial", "checkpoint.interval=null"]
    done = run_pipekit(["train", "c.yaml", *settings], cwd=disk.parent, environ={"PYTHONPATH": str(disk.parent)})
    assert done.returncode == 0, done.stderr
    assert "metrics.jsonl: cannot be written: the disk is full" in done.stdout
    assert "metrics.jsonl: written again" in done.stdout
    lines = (disk / "run/metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(1, 41))
    assert "bytes of output are lost" in (disk / "run/logs/rank-0.log").read_text()
    assert find_faults(find_latest(disk / "run/checkpoints") or Path()) == []
