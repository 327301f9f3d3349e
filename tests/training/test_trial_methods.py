"""Methods of a trial beside the usual ones: whole evaluations, own loaders, own lengths, policies of checkpoints."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader as TorchDataLoader
from torch.utils.data import DistributedSampler

from gloo_workers import GlooWorkers
from pipekit.checkpoint.manifest import list_checkpoints
from pipekit.data import DataLoader
from pipekit.training.context import TrialContext
from pipekit.training.periods import Batch
from pipekit.training.trial import Trial
from trial_jobs import MICRO_BATCH, Points, PointsTrial, fit, make_trial

pytestmark = pytest.mark.distributed


class Exact(Points):
    """The points without noise."""

    def __getitem__(self, index: int) -> tuple[int, torch.Tensor, torch.Tensor]:
        features = torch.sin(torch.arange(4) * (index + 1.0))
        return index, features, features.sum(0, keepdim=True)


class WholeEvaluation(Trial):
    """Trains as `PointsTrial`, evaluates all samples at once, and writes a curve to TensorBoard and a profile."""

    train_batch = PointsTrial.train_batch  # type: ignore[assignment]
    build_training_data_loader = PointsTrial.build_training_data_loader  # type: ignore[assignment]

    def __init__(self, context: TrialContext) -> None:
        PointsTrial.__init__(self, context)  # type: ignore[arg-type]
        self.engine: Any
        context.set_enable_tensorboard_logging(True)
        context.set_profiler(schedule=torch.profiler.schedule(wait=0, warmup=0, active=1, repeat=1))
        self.numbers: list[int] = []

    def evaluate_full_dataset(self, data_loader: Any) -> dict[str, Any]:
        assert not self.engine.module.training
        errors = []
        for numbers, features, targets in data_loader:
            self.numbers += numbers.tolist()
            errors.append((self.engine(features) - targets) ** 2)
        error = torch.cat(errors).mean()
        writer = self.context.get_tensorboard_writer()
        assert writer is self.context.get_tensorboard_writer()
        assert self.context.get_enable_tensorboard_logging()
        writer.add_scalar("error", error, self.context.current_train_batch())
        return {"error": error}

    def build_validation_data_loader(self) -> DataLoader:
        return DataLoader(Exact(5), batch_size=MICRO_BATCH)


def evaluate_whole(rank: int, folder: str) -> Any:
    trial = make_trial(folder, WholeEvaluation)
    result = fit(trial, max_length=Batch(1))
    inputs = [Exact()[index] for index in range(5)]
    trial.engine.module.eval()
    with torch.no_grad():
        outputs = trial.engine.module(torch.stack([features for _, features, _ in inputs]))
        expected = F.mse_loss(outputs, torch.stack([target for *_, target in inputs])).item()
    return trial.numbers, result.validation_metrics["error"], expected, trial.context.get_tensorboard_path()


def test_a_whole_evaluation_sees_every_sample_on_every_rank(gloo: GlooWorkers, tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    for rank, (numbers, error, expected, tensorboard) in enumerate(gloo.run(2, evaluate_whole, str(tmp_path))):
        assert numbers == [0, 1, 2, 3, 4]
        assert error == pytest.approx(expected, rel=1e-6)
        events = accumulator.EventAccumulator(str(tensorboard))
        events.Reload()
        ((step, value),) = [(event.step, event.value) for event in events.Scalars("error")]
        assert (step, value) == (0, pytest.approx(expected, rel=1e-6))
        # What the trainer reports, it writes once.
        assert sorted(events.Tags()["scalars"]) == (["error"] if rank else ["error", "loss", "val_error"])
    assert {path.name.split("-")[1] for path in (tmp_path / "profile").iterdir()} == {"0", "1"}


def log_again(rank: int, folder: str) -> None:
    arguments: dict[str, Any] = {"max_length": Batch(3), "reporting_period": Batch(1), "checkpoint_policy": "none"}
    for latest in ("never", f"{folder}/checkpoints/step-00000001"):
        trial = make_trial(folder)
        trial.context.set_enable_tensorboard_logging(True)
        fit(trial, checkpoint_period=Batch(1), latest_checkpoint=latest, **arguments)
        trial.engine.destroy()


def test_what_a_resumed_training_logs_again_is_in_tensorboard_once(gloo: GlooWorkers, tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    gloo.run(1, log_again, str(tmp_path))
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    assert [event.step for event in events.Reload().Scalars("loss")] == [1, 2, 3]


class OwnLoader(PointsTrial):
    """Shards and shuffles with torch's sampler, in batches whose first tensor is no sample's."""

    def __init__(self, context: TrialContext) -> None:
        super().__init__(context)
        context.disable_dataset_reproducibility_checks()

    def build_training_data_loader(self) -> Any:
        role = self.context.role
        sampler = DistributedSampler(Exact(), role.data_parallel_world_size, role.data_parallel_rank, seed=3)  # type: ignore[arg-type, var-annotated]
        return TorchDataLoader(Exact(), MICRO_BATCH, sampler=sampler)  # type: ignore[arg-type, var-annotated]

    def build_validation_data_loader(self) -> Any:
        """Micro-batches `(weights (7,), samples)` of 2 and 1 samples, the same on both ranks."""
        return [(torch.zeros(7), torch.full((count, 1), float(count))) for count in (2, 1)]

    def evaluate_batch(self, dataloader_iter: Iterator[Any] | None, batch_idx: int) -> dict[str, Any]:
        assert dataloader_iter is not None
        _, samples = next(dataloader_iter)
        return {"error": samples.mean()}

    def get_batch_length(self, batch: Any) -> int:
        return len(batch[1])


def train_on_own_loader(rank: int, folder: str) -> Any:
    whole = make_trial(f"{folder}/whole", OwnLoader)
    error = fit(whole, max_length=Batch(3)).validation_metrics["error"]
    fit(make_trial(f"{folder}/parts", OwnLoader), max_length=Batch(1))
    rest = make_trial(f"{folder}/parts", OwnLoader)
    fit(rest, max_length=Batch(3))
    assert rest.read == whole.read[3:]
    return whole.read, error


def test_an_own_loader_is_read_again_to_where_the_run_goes_on(gloo: GlooWorkers, tmp_path: Path) -> None:
    results = gloo.run(2, train_on_own_loader, str(tmp_path))
    numbers = [sorted(number for _, *samples in read for number in samples) for read, _ in results]
    # 9 micro-batches of each rank are one and a half of its 6; torch's order is the same in each epoch.
    assert len(numbers[0]) == len(numbers[1])
    assert set(numbers[0]) | set(numbers[1]) == set(range(22))
    # Means weigh by the length that the trial tells: (2 * 2 + 1 * 1) / 3.
    assert [error for _, error in results] == [pytest.approx(5 / 3)] * 2


class Scripted(PointsTrial):
    """Has errors that are known beforehand."""

    errors = (5.0, 3.0, 4.0, 2.0)

    def evaluate_batch(self, dataloader_iter: Iterator[Any] | None, batch_idx: int) -> dict[str, Any]:
        assert dataloader_iter is not None
        next(dataloader_iter)
        return {"other": 0.0, "error": self.errors[self.num_batches - 1]}


def keep_by_policy(rank: int, folder: str) -> dict[str, list[str]]:
    kept = {}
    policies: dict[str, dict[str, Any]] = {
        "all": {"checkpoint_policy": "all"},
        "lowest": {"best_metric": "error"},
        "highest": {"best_metric": "error", "best_is": "highest"},
        "none": {"checkpoint_policy": "none"},
    }
    for name, arguments in policies.items():
        trial = make_trial(f"{folder}/{name}", Scripted)
        fit(trial, max_length=Batch(4), validation_period=Batch(1), **arguments)
        saved = [event.split()[-1] for event in trial.seen.events if event.startswith("save_start")]
        left = [str(int(path.name.partition("-")[2])) for path in list_checkpoints(Path(folder) / name / "checkpoints")]
        kept[name] = [" ".join(saved), " ".join(left)]
        trial.engine.destroy()
    return kept


def test_checkpoints_follow_the_policy_and_the_best_is_kept(gloo: GlooWorkers, tmp_path: Path) -> None:
    (kept,) = gloo.run(1, keep_by_policy, str(tmp_path))
    assert kept == {
        "all": ["1 2 3 4", "1 2 3 4"],
        "lowest": ["1 2 4", "2 4"],
        "highest": ["1 4", "1 4"],
        "none": ["4", "4"],
    }
