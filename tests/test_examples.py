"""The examples of trials, by the claims that they make."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import yaml

from examples import alexnet_pipeline, dcgan, roc_auc, zero3_offload
from fork_server import run_pipekit, run_script
from gloo_workers import GlooWorkers
from pipekit.checkpoint.retention import Retention
from pipekit.training.periods import Batch
from trial_jobs import fit, make_trial

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = ["alexnet_pipeline", "dcgan", "roc_auc", "spirals_trial", "zero3_offload"]

pytestmark = pytest.mark.distributed


def records(folder: Path, key: str) -> list[float]:
    """The values of a metric in a run's folder, in their order."""
    lines = map(yaml.safe_load, (folder / "metrics.jsonl").read_text().splitlines())
    return [line[key] for line in lines if key in line]


def train_dcgan(rank: int, folder: str, length: int) -> dict[str, Any]:
    """Train without interruption, and again from the middle on."""

    def train(**arguments: Any) -> dict[str, Any]:
        trial = make_trial(folder, dcgan.DCGANTrial, lr=2e-3)
        result = fit(trial, max_length=Batch(length), reporting_period=Batch(length // 2), **arguments)
        engines = (trial.generator, trial.discriminator)
        weights = [parameter.tolist() for engine in engines for parameter in engine.module.parameters()]
        for engine in engines:
            engine.destroy()
        return {"weights": weights, "metrics": result.metrics, "validation": result.validation_metrics}

    half = Batch(length // 2)
    whole = train(checkpoint_period=half, step_zero_validation=True, retention=Retention())
    again = train(latest_checkpoint=f"{folder}/checkpoints/step-{length // 2:08d}")
    assert again == whole
    return whole


@pytest.mark.parametrize(("dp", "length"), [(1, 24), (2, 2)])
def test_the_dcgan_trains_and_is_resumed_bit_for_bit(gloo: GlooWorkers, tmp_path: Path, dp: int, length: int) -> None:
    results = gloo.run(dp, train_dcgan, str(tmp_path), length)
    assert all(result == results[0] for result in results)
    assert all((tmp_path / f"checkpoints/step-{length:08d}/model{engine}").is_dir() for engine in (0, 1))
    if dp == 1:
        # Spots are dark for the most part, and the images of an untrained generator are gray.
        errors = records(tmp_path, "val_brightness_error")
        assert errors[-1] < 0.5 * errors[0]


def train_alexnet(rank: int, folder: str, stages: int) -> Any:
    trial = make_trial(folder, alexnet_pipeline.AlexNetTrial, width=4, stages=stages)
    assert len(trial.engine.module.stages) == 1
    result = fit(trial, max_length=Batch(4), reporting_period=Batch(1))
    trial.engine.destroy()
    return result.validation_metrics


def test_alexnet_trains_in_two_stages_as_in_one(gloo: GlooWorkers, tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    (expected,) = gloo.run(1, train_alexnet, str(one), 1)
    for metrics in gloo.run(2, train_alexnet, str(two), 2):
        assert metrics == pytest.approx(expected, rel=1e-4)
    assert records(two, "loss") == pytest.approx(records(one, "loss"), rel=1e-4)


def train_offloaded(rank: int, folder: str) -> list[str]:
    trial = make_trial(folder, zero3_offload.WavesTrial, width=16, lr=1e-2)
    fit(trial, max_length=Batch(5), reporting_period=Batch(1))
    sharded = [name for name, weight in trial.engine.module.named_parameters() if weight.ds_tensor.numel() > 0]
    assert all(weight.numel() == 0 for weight in trial.engine.module.parameters())
    trial.engine.destroy()
    return sharded


def test_zero_3_with_offload_trains_as_torch_does(gloo: GlooWorkers, tmp_path: Path) -> None:
    sharded, _ = gloo.run(2, train_offloaded, str(tmp_path))
    torch.manual_seed(1)
    model = zero3_offload.WaveTransformer(16, num_layers=2)
    assert sharded == [name for name, _ in model.named_parameters()]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    # Two replicas, two micro-batches of four each.
    for points, following in islice(torch.utils.data.DataLoader(zero3_offload.Waves(256), batch_size=16), 5):
        loss = F.mse_loss(model(points), following)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert records(tmp_path, "loss") == pytest.approx(losses, rel=1e-4)


def train_roc_auc(rank: int, folder: str) -> tuple[float, torch.Tensor]:
    trial = make_trial(folder, roc_auc.PatientsTrial)
    result = fit(trial, max_length=Batch(10))
    measurements = torch.stack([measurement for measurement, _ in patients()])
    scores = trial.engine.module(measurements).squeeze(-1).tolist()
    trial.engine.destroy()
    return result.validation_metrics["auc"], scores


def patients() -> list[Any]:
    whole = roc_auc.Patients(400, 101)
    return [whole[index] for index in range(len(whole))]


def test_the_area_under_the_curve_is_that_of_scikit_learn_on_the_whole_set(gloo: GlooWorkers, tmp_path: Path) -> None:
    score = pytest.importorskip("sklearn.metrics").roc_auc_score
    labels = [int(label) for _, label in patients()]
    assert 0 < sum(labels) < 101
    for auc, scores in gloo.run(2, train_roc_auc, str(tmp_path)):
        # The model and its scores are the same in both; they are not learnt well, and not by heart.
        assert auc == pytest.approx(score(labels, scores), abs=1e-12)
        assert 0.6 < auc < 0.99
    reducer = roc_auc.AreaUnderCurve()
    tied = [0.1, 0.5, 0.5, 0.5, 0.9, 0.1, 0.1]
    reducer.update(torch.tensor(tied), torch.tensor([0.0, 1.0, 0.0, 0.0, 1.0, 1.0, 0.0]))
    assert reducer.cross_slot_reduce([reducer.per_slot_reduce()]) == pytest.approx(score([0, 1, 0, 0, 1, 1, 0], tied))


def test_a_converted_script_has_the_losses_of_the_ordinary_one(tmp_path: Path) -> None:
    for name in ("spirals", "spirals_trial"):
        done = run_script(ROOT / "examples" / f"{name}.py", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        if name == "spirals":
            ordinary = [line.split() for line in done.stdout.splitlines() if line.startswith("epoch")]
    losses, accuracies = ([float(words[place].rstrip(",")) for words in ordinary] for place in (3, 5))
    assert len(losses) == 10
    folder = tmp_path / "runs" / "spirals_trial"
    assert records(folder, "loss") == pytest.approx(losses, abs=2e-6)
    assert records(folder, "val_accuracy") == pytest.approx(accuracies, abs=1e-4)
    assert accuracies[-1] > 0.9


def test_the_page_shows_both_scripts() -> None:
    page = (ROOT / "docs" / "converting.md").read_text()
    for name in ("spirals", "spirals_trial"):
        assert f"```python\n{(ROOT / 'examples' / f'{name}.py').read_text()}```" in page


@pytest.mark.slow
@pytest.mark.parametrize("name", SCRIPTS)
def test_every_script_trains_as_its_first_lines_say(tmp_path: Path, name: str) -> None:
    done = run_pipekit(
        ["launch", "--processes", "2", "--device", "cpu", str(ROOT / f"examples/{name}.py")], cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert list((tmp_path / "runs" / name / "checkpoints").glob("step-*"))
