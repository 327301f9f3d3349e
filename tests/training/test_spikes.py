"""Spikes of the loss: their scores against plain Python's statistics, and what follows against a loop of torch's."""

from __future__ import annotations

import json
import math
import random
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pipekit.config import Config, parse_config
from pipekit.data.collate import MapDataset
from pipekit.distributed.mpu import ModelParallelUnit
from pipekit.distributed.processes import join_alone, leave_processes
from pipekit.errors import NumbersError
from pipekit.layers.sequential import SequentialModel
from pipekit.layers.specs import LayerSpec
from pipekit.layout import Layout
from pipekit.plan.decide import decide_run
from pipekit.plan.resources import Resources
from pipekit.plan.run_folder import RunFolder, find_start
from pipekit.training.layers_run import LayersRun
from pipekit.training.layers_trial import LayersTrial
from pipekit.training.loggers import MetricsFile
from pipekit.training.run_context import RunContext
from pipekit.training.spikes import SpikeDetector
from pipekit.training.trial_callbacks import TrialCallback


def plain_score(losses: list[float], loss: float) -> float:
    median = statistics.median(losses)
    deviations = sorted(abs(each - median) for each in losses)
    return (loss - median) / (1.4826 * statistics.median(deviations))


def test_the_score_is_the_distance_from_the_median_in_median_deviations() -> None:
    draw = random.Random(1)
    losses = [3.0 + draw.gauss(0, 0.1) for _ in range(200)]
    detector = SpikeDetector(window=50, threshold=8.0)
    scores = [detector.add(loss) for loss in losses]
    assert scores[:20] == [None] * 20
    for place in range(20, 200):
        assert scores[place] == pytest.approx(plain_score(losses[max(0, place - 50) : place], losses[place]))


def test_healthy_losses_have_no_spikes_and_a_jump_is_one_until_it_lasts() -> None:
    draw = random.Random(2)
    detector = SpikeDetector(window=40, threshold=12.0)
    falling = [8.0 * math.exp(-step / 60) + 2.0 + draw.gauss(0, 0.05) for step in range(500)]
    assert all((detector.add(loss) or 0.0) < 12.0 for loss in falling)
    jumped = [(detector.add(4.0 + draw.gauss(0, 0.05)) or 0.0) > 12.0 for _ in range(40)]
    assert jumped[:15] == [True] * 15
    assert not any(jumped[21:])


def test_losses_that_are_not_finite_do_not_count_and_equal_ones_have_a_spread() -> None:
    detector = SpikeDetector(window=20, threshold=12.0)
    for _ in range(20):
        assert detector.add(math.nan) is None
    assert all(detector.add(2.0) is None for _ in range(20))
    assert detector.add(2.001) == pytest.approx(0.5)


# Whole runs, of a regression some samples of which have targets that are far off.

BATCH, SAMPLES, STEPS = 4, 400, 44
BAD = (25, 33)
"""Steps of an undisturbed run whose batches are bad."""


def sample(index: int) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(index)
    inputs = torch.randn(3, generator=draw)
    bad = index // BATCH + 1 in BAD
    return inputs, inputs.sum(0, keepdim=True) + 0.1 * torch.randn(1, generator=draw) + (50.0 if bad else 0.0)


class Samples(MapDataset):
    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return sample(index)


class Regression(LayersTrial):
    @classmethod
    def build_layers(cls, config: Config) -> list[LayerSpec]:
        return [LayerSpec(nn.Linear, 3, 8), LayerSpec(nn.Tanh), LayerSpec(nn.Linear, 8, 1)]

    def loss(self, outputs: Tensor, labels: Tensor) -> Tensor:
        return (outputs - labels).square().mean()

    def build_train_dataset(self) -> MapDataset:
        return Samples()


class Notes(TrialCallback):
    def __init__(self, dies_after: int | None = None) -> None:
        self.losses: list[float] = []
        self.warnings: list[str] = []
        self._dies_after = dies_after

    def on_metrics(self, step: int, metrics: dict[str, Any]) -> None:
        self.losses.append(metrics["loss"])
        if len(self.losses) == self._dies_after:
            raise KeyboardInterrupt

    def on_warning(self, message: str) -> None:
        self.warnings.append(message)


@pytest.fixture(scope="module", autouse=True)
def alone() -> Iterator[None]:
    join_alone(device="cpu")
    yield
    leave_processes()


def train(folder: Path, *, dies_after: int | None = None, **keys: Any) -> Notes:
    values = {
        "model": {"builder": "examples.my_model:build_layers"},
        "run": {"dir": str(folder), "device": "cpu"},
        "data": {"shuffle": False},
        "train": {"steps": STEPS, "global_batch_size": BATCH, "micro_batch_size": 2, "precision": "fp32", **keys},
        "optimizer": {"type": "sgd", "lr": 0.02, "weight_decay": 0.0},
        "scheduler": {"type": "constant"},
        "checkpoint": {"interval": 10, "keep": None},
    }
    config = parse_config(values)
    decision = decide_run(config, Regression, Resources(world_size=1), start=find_start(config))
    mpu = ModelParallelUnit(Layout(pp=1, dp=1, tp=1), placement=(0,))
    notes, run_folder = Notes(dies_after), RunFolder(folder)
    context = RunContext(decision.plan, decision.specs, mpu, torch.device("cpu"), run_folder)
    run = LayersRun(Regression(context))
    try:
        run.fit([MetricsFile(run_folder, pytest.fail), notes])
    except KeyboardInterrupt:
        assert dies_after is not None
    finally:
        run.engine.destroy()
    return notes


def plain_losses(batches: list[int], *, skipped: tuple[int, ...] = (), seed: int = 1234) -> list[float]:
    """Train on batches, counted from 1, in order, with nothing but torch; those that are skipped have no update."""
    specs = Regression.build_layers(parse_config({"model": {"preset": "tiny"}, "train": {"steps": 1}}))
    model = SequentialModel(specs, seed=seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    losses = []
    for number in batches:
        pairs = [sample(index) for index in range((number - 1) * BATCH, number * BATCH)]
        inputs, labels = (torch.stack(part) for part in zip(*pairs, strict=True))
        loss = (model(inputs) - labels).square().mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        if number not in skipped:
            optimizer.step()
        losses.append(loss.item())
    return losses


def spikes(folder: Path) -> list[tuple[int, int, int]]:
    lines = (folder / "spikes.jsonl").read_text().splitlines()
    return [(record["step"], record["first_sample"], record["end"]) for record in map(json.loads, lines)]


def test_the_default_tells_of_spikes_and_changes_nothing(tmp_path: Path) -> None:
    notes = train(tmp_path)
    assert notes.losses == pytest.approx(plain_losses(list(range(1, STEPS + 1))), rel=1e-4)
    assert spikes(tmp_path) == [(25, 96, 100), (33, 128, 132)]
    assert len(notes.warnings) == 2
    assert "spreads above the median of the last ones (samples 96 to 99)" in notes.warnings[0]


def test_a_batch_that_is_skipped_has_no_update(tmp_path: Path) -> None:
    notes = train(tmp_path, on_spike="skip")
    assert notes.losses == pytest.approx(plain_losses(list(range(1, STEPS + 1)), skipped=BAD), rel=1e-4)
    assert notes.warnings[0].endswith("; its update is left out")
    assert spikes(tmp_path) == [(25, 96, 100), (33, 128, 132)]


# After step 25 the run is at step 20 again and goes on with batch 26. Batch 33 is then that of step 28, after which it
# is at step 20 again, with batch 34.
AFTER_ROLLBACKS = [*range(1, 21), *range(34, 34 + STEPS - 20)]


def test_a_rollback_goes_on_from_the_last_checkpoint_with_later_data(tmp_path: Path) -> None:
    notes = train(tmp_path, on_spike="rollback")
    expected = plain_losses(AFTER_ROLLBACKS)
    assert notes.losses[20 - STEPS :] == pytest.approx(expected[20:], rel=1e-4)
    recorded = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in recorded] == list(range(1, STEPS + 1))
    assert [record["loss"] for record in recorded] == pytest.approx(expected, rel=1e-4)
    assert spikes(tmp_path) == [(25, 96, 100), (28, 128, 132)]
    assert notes.warnings[1].endswith("step-00000020, past the samples 80 to 99")


@pytest.mark.parametrize(
    ("on_spike", "dies_after"),
    [("rollback", 31), *(pytest.param(*each, marks=pytest.mark.slow) for each in [("rollback", 24), ("skip", 31)])],
)
def test_a_run_that_is_killed_decides_as_the_undisturbed_one(tmp_path: Path, on_spike: str, dies_after: int) -> None:
    whole = train(tmp_path / "whole", on_spike=on_spike)
    train(tmp_path / "killed", on_spike=on_spike, dies_after=dies_after)
    train(tmp_path / "killed", on_spike=on_spike)
    read = [json.loads(line) for line in (tmp_path / "killed/metrics.jsonl").read_text().splitlines()]
    assert [record["loss"] for record in read][-14:] == whole.losses[-14:]
    assert len(read) == STEPS


def test_without_a_checkpoint_there_is_nothing_to_go_back_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[__name__], "BAD", (7,))
    notes = train(tmp_path, on_spike="rollback", steps=9, spike_window=5, spike_threshold=50.0)
    assert notes.losses == pytest.approx(plain_losses(list(range(1, 10))), rel=1e-4)
    assert notes.warnings[1:] == ["step 7: there is no checkpoint to go back to; going on"]


def test_a_run_that_goes_back_to_one_checkpoint_again_and_again_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules[__name__], "BAD", range(25, 99))
    with pytest.raises(
        NumbersError, match=r"the run has gone back to the checkpoint of step 20 3 times, to other data"
    ):
        train(tmp_path, on_spike="rollback")
    assert spikes(tmp_path) == [(25, 96, 100), (21, 100, 104), (21, 104, 108), (21, 108, 112)]
