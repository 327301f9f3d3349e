"""Runs with a curriculum, batch-size warm-up and layer drop together, against a loop written out in torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from deepspeed.runtime.data_pipeline.curriculum_scheduler import CurriculumScheduler
from torch import Tensor, nn

from fork_server import run_pipekit
from pipekit.config import load_config
from pipekit.data.order import SampleOrder
from pipekit.layers.specs import build_layer, layer_names
from pipekit.models import build_layers
from pipekit.rng import fold_seed

pytestmark = pytest.mark.distributed

VOCAB, SEQUENCE, BATCH, STEPS, SAMPLES, BLOCKS = 53, 16, 12, 20, 40, 4
START, INCREMENT, WARMUP_SAMPLES = 4, 4, 40
MIN_LENGTH, CURRICULUM_STEPS, UNIT = 4, 12, 4
THETA, GAMMA = 0.3, 0.3

TRIAL = f"""
import torch

import pipekit
from pipekit.models import build_layers
from pipekit.models.transformer import language_model_loss


class Samples:
    def __len__(self):
        return {SAMPLES}

    def __getitem__(self, index):
        tokens = torch.randint({VOCAB}, ({SEQUENCE},), generator=torch.Generator().manual_seed(index))
        return tokens, (tokens * 3 + 1) % {VOCAB}


class Trial(pipekit.LayersTrial):
    @classmethod
    def build_layers(cls, config):
        return build_layers(config)

    def build_train_dataset(self):
        return Samples()

    def build_validation_dataset(self):
        return Samples()

    def loss(self, outputs, labels):
        return language_model_loss(outputs, labels)
"""

CONFIG: dict[str, Any] = {
    "run": {"timeout_s": 60, "trial": "growth_trial:Trial", "dir": "runs/growth"},
    "model": {
        "vocab_size": VOCAB, "hidden_size": 16, "num_layers": BLOCKS, "num_heads": 2, "max_positions": SEQUENCE,
        "init_std": 0.1, "tied_embedding": False,
    },
    "train": {
        "steps": STEPS, "global_batch_size": BATCH, "sequence_length": SEQUENCE, "precision": "fp32",
        "eval_interval": 10, "eval_batches": 1,
        "curriculum": {
            "min_difficulty": MIN_LENGTH, "total_curriculum_step": CURRICULUM_STEPS, "difficulty_step": UNIT,
        },
        "batch_warmup": {"start": START, "increment": INCREMENT, "samples": WARMUP_SAMPLES},
        "layer_drop": {"theta": THETA, "gamma": GAMMA},
    },
    "optimizer": {"lr": 5e-3, "weight_decay": 0.0, "eps": 1e-5},
    "scheduler": {"type": "constant"},
    "checkpoint": {"interval": None},
}  # fmt: skip


def train(folder: Path, *changes: str) -> list[dict[str, Any]]:
    """Run the command, and return the metrics of the whole run folder."""
    (folder / "growth_trial.py").write_text(TRIAL)
    (folder / "c.yaml").write_text(yaml.safe_dump(CONFIG))
    done = run_pipekit(["train", "c.yaml", *changes], cwd=folder, environ={"PYTHONPATH": str(folder)})
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in (folder / "runs/growth/metrics.jsonl").read_text().splitlines()]


def samples(indices: list[int]) -> tuple[Tensor, Tensor]:
    """Tokens and labels `(B, S)` of the run's samples with these indices."""
    generators = [torch.Generator().manual_seed(index) for index in indices]
    tokens = torch.stack([torch.randint(VOCAB, (SEQUENCE,), generator=each) for each in generators])
    return tokens, (tokens * 3 + 1) % VOCAB


class Plain:
    """The model of a run as one list of modules, trained step by step with nothing but torch."""

    def __init__(self, config: Any) -> None:
        specs, self.seed = build_layers(config), config.train.seed
        self.names = layer_names(specs)
        self.layers = nn.ModuleList(
            build_layer(spec, name=name, seed=self.seed) for spec, name in zip(specs, self.names, strict=True)
        )
        for name, layer in zip(self.names, self.layers, strict=True):
            layer.requires_grad_(f"{name}.*" not in config.train.freeze)
        self.trained = [parameter for parameter in self.layers.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=5e-3, betas=(0.9, 0.95), eps=1e-5, weight_decay=0)
        self.order = SampleOrder(SAMPLES, self.seed)
        self.theta = 1.0 if config.train.layer_drop is None else THETA
        self.micro_batch_size = config.train.micro_batch_size
        self.num_left_out = 0

    def forward(self, tokens: Tensor, *, keeps: list[float | None]) -> Tensor:
        """Scores of a micro-batch; each block has the factor of what it adds, or None where it is left out."""
        x: Tensor = tokens
        for name, layer in zip(self.names, self.layers, strict=True):
            factor = keeps[int(name.split(".")[1])] if name.startswith("blocks.") else 1.0
            if factor == 1.0:
                x = layer(x)
            elif factor is not None:
                x = x + factor * (layer(x) - x)
        return x

    def step(self, number: int, position: int, length: int, size: int) -> float:
        theta = (1 - self.theta) * np.exp(-GAMMA * (number - 1)) + self.theta
        probabilities = 1 - np.arange(1, BLOCKS + 1) / BLOCKS * (1 - theta)
        total = torch.zeros(())
        indices = self.order.indices(position, size).tolist()
        for place, first in enumerate(range(0, size, self.micro_batch_size)):
            draws = [
                fold_seed(self.seed, "layer drop", number - 1, place, block) / 2**63 for block in range(1, BLOCKS + 1)
            ]
            keeps = [1 / float(p) if draw < p else None for draw, p in zip(draws, probabilities, strict=True)]
            self.num_left_out += keeps.count(None)
            tokens, labels = samples(indices[first : first + self.micro_batch_size])
            scores = self.forward(tokens[:, :length], keeps=keeps)
            loss = F.cross_entropy(scores.flatten(0, 1), labels[:, :length].flatten())
            total = total + loss * self.micro_batch_size / size
        total.backward()
        for parameter in self.trained:
            parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(total.detach())

    def evaluate(self) -> float:
        tokens, labels = samples(list(range(BATCH)))
        with torch.no_grad():
            scores = self.forward(tokens, keeps=[1.0] * BLOCKS)
        return float(F.cross_entropy(scores.flatten(0, 1), labels.flatten()))


def expect(folder: Path) -> tuple[list[float], list[int], list[int], list[float]]:
    """Losses, lengths and batch sizes of all steps, and held-out losses, of a run in one process."""
    model = Plain(load_config(folder / "runs/growth/config.yaml"))
    curriculum = CurriculumScheduler(
        {
            "min_difficulty": MIN_LENGTH,
            "max_difficulty": SEQUENCE,
            "schedule_type": "fixed_linear",
            "schedule_config": {"total_curriculum_step": CURRICULUM_STEPS, "difficulty_step": UNIT},
        }
    )
    losses, lengths, sizes, held_out = [], [], [], [model.evaluate()]
    for number in range(1, STEPS + 1):
        position = sum(sizes)
        increments = int(position / (WARMUP_SAMPLES / ((BATCH - START) / INCREMENT)))
        sizes.append(BATCH if position > WARMUP_SAMPLES else START + increments * INCREMENT)
        lengths.append(curriculum.update_difficulty(number))
        losses.append(model.step(number, position, lengths[-1], sizes[-1]))
        if number % 10 == 0:
            held_out.append(model.evaluate())
    assert model.num_left_out > 50 or model.theta == 1.0
    return losses, lengths, sizes, held_out


def check(records: list[dict[str, Any]], folder: Path) -> None:
    losses, lengths, sizes, held_out = expect(folder)
    steps = [record for record in records if "loss" in record]
    assert [record["sequence_length"] for record in steps] == lengths
    assert [record["global_batch_size"] for record in steps] == sizes
    assert len(set(lengths)) == 4
    assert len(set(sizes)) == 3
    assert [record["loss"] for record in steps] == pytest.approx(losses, abs=1e-5)
    evaluated = {record["step"]: record["val_loss"] for record in records if "val_loss" in record}
    assert list(evaluated.values()) == pytest.approx(held_out, abs=1e-5)
    if "layer_drop_theta" not in steps[0]:
        return
    thetas = (1 - THETA) * np.exp(-GAMMA * np.arange(STEPS)) + THETA
    assert [record["layer_drop_theta"] for record in steps] == pytest.approx(thetas.tolist(), abs=1e-5)


def test_one_process_trains_as_a_loop_in_torch_does(tmp_path: Path) -> None:
    # Recomputed layers, and the step that is computed twice, leave out the same blocks.
    check(
        train(
            tmp_path, "train.activation_checkpointing=true", "train.check_computation=20", "train.micro_batch_size=2"
        ),
        tmp_path,
    )


@pytest.mark.slow
def test_all_axes_train_as_a_loop_in_torch_does_and_go_on_at_another_layout(tmp_path: Path) -> None:
    # In four stages, of which those in the middle hold nothing but blocks that are left out now and then.
    interleaved = ["parallel.pp=2", "parallel.dp=2", "parallel.schedule=interleaved-1f1b", "parallel.partition=uniform"]
    # Before the first block nothing is trained, so that it alone lets gradients reach the first stage.
    frozen = "train.freeze=['embed.*', 'position.*']"
    train(tmp_path, *interleaved, frozen, "train.steps=10", "data.workers=1")
    check(train(tmp_path, frozen, "parallel.pp=2", "parallel.tp=2", "parallel.schedule=zb-h1"), tmp_path)


@pytest.mark.slow
def test_zero_2_trains_as_a_loop_in_torch_does(tmp_path: Path) -> None:
    check(train(tmp_path, "parallel.zero=2", "parallel.dp=2", "train.layer_drop=false"), tmp_path)
