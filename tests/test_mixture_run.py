"""Mixtures from end to end: the shipped example, and a run that is killed and goes on under other settings."""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml

from fork_server import run_pipekit

pytestmark = pytest.mark.distributed

ROOT = Path(__file__).resolve().parents[1]
STEPS, BATCH, SEQUENCE = 48, 8, 16

# Notes the samples that are trained on, by their tokens, and kills its process in a step.
TRIAL = """
import os, signal
from pathlib import Path

from pipekit.training.language_model import LanguageModelTrial


class NotingTrial(LanguageModelTrial):
    def learning_rate(self, step):
        self.step = step
        return super().learning_rate(step)

    def loss(self, outputs, labels):
        if self.step == int(os.environ.get("KILLED_IN", -1)):
            os.kill(os.getpid(), signal.SIGKILL)
        with Path(os.environ["NOTES"], f"{os.getpid()}.txt").open("a") as notes:
            notes.writelines(f"{self.step} {' '.join(map(str, sample))}\\n" for sample in labels.tolist())
        return super().loss(outputs, labels)
"""


def metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_the_example_trains_in_both_stages_and_reports_each_source(tmp_path: Path) -> None:
    for name in ("examples", "docs"):
        (tmp_path / name).symlink_to(ROOT / name)
    small = ["train.steps=4", "train.eval_interval=2", "train.eval_batches=1", "train.sequence_length=32"]
    small += ["data.max_bytes=100000", "data.vocab_size=300", "data.cache_dir=cache", "model.hidden_size=16"]
    small += ["model.num_layers=1", "data.stages.0.after_step=2", "data.workers=1"]
    done = run_pipekit(["train", "examples/mixture.yaml", *small], cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    records = metrics(tmp_path / "runs/mixture")
    # 80 % and then 40 % of 32 samples each.
    assert [(each["samples/code"], each["samples/prose"]) for each in records[1:]] == [
        (13, 3),
        (26, 6),
        (32, 16),
        (39, 25),
    ]
    assert 0 < records[-1]["epochs/prose"] < 1
    last = records[-1]
    assert last["val_loss"] == pytest.approx(0.8 * last["val_loss/code"] + 0.2 * last["val_loss/prose"])
    assert "source code   39 samples" in done.stdout
    assert "source prose  25 samples" in done.stdout


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mixture")
    draw = random.Random(1)
    for name, words in {"web": 800, "code": 600, "math": 400}.items():
        documents = [" ".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=50)) for _ in range(words // 50)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    mixture = [
        {"name": "web", "source": "web.jsonl", "weight": 0.5},
        {"name": "code", "source": "code.jsonl", "weight": 0.3},
        {"name": "math", "source": "math.jsonl#7", "weight": 0.2, "epochs": 4},
    ]
    config = {
        "run": {"timeout_s": 60, "trial": "noting_trial:NotingTrial"},
        "model": {"hidden_size": 16, "num_layers": 2, "num_heads": 2, "max_positions": SEQUENCE},
        "train": {"steps": STEPS, "global_batch_size": BATCH, "sequence_length": SEQUENCE, "precision": "fp32"},
        "data": {
            "mixture": mixture,
            "stages": [{"after_step": 20, "weights": {"web": 0.2, "code": 0.2, "math": 0.6}}],
            "vocab_size": 300,
            "validation_fraction": 0,
            "cache_dir": "cache",
        },
        "checkpoint": {"interval": 10},
    }
    (folder / "c.yaml").write_text(yaml.safe_dump(config))
    (folder / "noting_trial.py").write_text(TRIAL)
    return folder


class Run:
    """A run that may take several starts, and what each of its steps was trained on the last time."""

    def __init__(self, workspace: Path, name: str) -> None:
        self._workspace, self.folder = workspace, workspace / "runs" / name
        self.steps: dict[int, Counter[str]] = {}

    def start(self, *settings: str, killed_in: int | None = None) -> None:
        notes = self.folder.with_suffix(f".notes-{killed_in}")
        notes.mkdir(parents=True)
        environ = {"NOTES": str(notes), "PYTHONPATH": str(self._workspace)}
        environ |= {} if killed_in is None else {"KILLED_IN": str(killed_in)}
        arguments = ["train", "c.yaml", f"run.dir={self.folder.relative_to(self._workspace)}", *settings]
        done = run_pipekit(arguments, cwd=self._workspace, environ=environ)
        assert done.returncode == (0 if killed_in is None else 3), done.stderr
        lines = [line for path in notes.iterdir() for line in path.read_text().splitlines()]
        trained: dict[int, Counter[str]] = {}
        for line in lines:
            step, _, sample = line.partition(" ")
            trained.setdefault(int(step), Counter())[sample] += 1
        self.steps |= trained


@pytest.mark.slow
def test_a_run_that_is_killed_and_changed_reads_every_sample_of_every_source_as_the_whole_one(workspace: Path) -> None:
    whole, changed = Run(workspace, "whole"), Run(workspace, "changed")
    whole.start("train.micro_batch_size=8")
    changed.start("train.micro_batch_size=2", "data.workers=2", killed_in=15)
    changed.start("train.micro_batch_size=1", "parallel.dp=2", killed_in=33)
    changed.start("train.micro_batch_size=4", "parallel.pp=2", "data.workers=1")
    assert [sum(samples.values()) for samples in whole.steps.values()] == [BATCH] * STEPS
    assert changed.steps == whole.steps
    counts = [{key: value for key, value in metrics(run.folder)[-1].items() if "/" in key} for run in (whole, changed)]
    assert counts[0] == counts[1]
    assert counts[0]["epochs/web"] > 3
    assert counts[0]["epochs/code"] > 3
    assert counts[0]["epochs/math"] == 4
