"""The loop of a trial on plain modules: periods, resumption, evaluation, callbacks."""

from __future__ import annotations

import errno
import json
import multiprocessing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from gloo_workers import GlooWorkers
from pipekit.checkpoint.retention import Retention
from pipekit.data import DataLoader
from pipekit.errors import StorageError
from pipekit.training.periods import Batch, Epoch, Samples
from pipekit.training.reducers import Reducer
from pipekit.training.trial_callbacks import TrialCallback
from trial_jobs import ACCUMULATION, MICRO_BATCH, NUM_SAMPLES, Points, PointsTrial, fit, make_trial

pytestmark = pytest.mark.distributed

LENGTH = 4


def resume_everywhere(rank: int, folder: str, workers: int) -> dict[str, Any]:
    """Train without interruption, then from each of its checkpoints on, each time with engines of its own."""

    # Ranks of tests are daemons, which multiprocessing gives no children.
    multiprocessing.current_process()._config["daemon"] = False  # type: ignore[attr-defined]

    def train(**arguments: Any) -> Any:
        torch.manual_seed(99 + rank)
        trial = make_trial(folder, workers=workers)
        result = fit(trial, max_length=Batch(LENGTH), reporting_period=Batch(1), retention=Retention(), **arguments)
        weights = [parameter.detach().clone() for parameter in trial.engine.module.parameters()]
        trial.engine.destroy()
        return trial, result, weights

    whole, result, weights = train(checkpoint_period=Batch(1))
    for batch in range(1, LENGTH):
        part, result, its_weights = train(latest_checkpoint=f"{folder}/checkpoints/step-{batch:08d}")
        assert result.batch == LENGTH
        assert part.context.get_initial_batch() == batch
        assert part.read == whole.read[batch * ACCUMULATION :]
        assert part.seen.losses == whole.seen.losses[batch * ACCUMULATION :]
        assert part.seen.num_reports == LENGTH
        assert all(map(torch.equal, its_weights, weights))
    return {"read": whole.read, "losses": whole.seen.losses, "metrics": result.metrics}


@pytest.mark.parametrize(("dp", "workers"), [(1, 0), (2, 2)])
def test_a_resume_at_any_batch_goes_on_bit_for_bit(gloo: GlooWorkers, tmp_path: Path, dp: int, workers: int) -> None:
    results = gloo.run(dp, resume_everywhere, str(tmp_path), workers)
    for result in results:
        assert len(result["losses"]) == LENGTH * ACCUMULATION
    # The replicas take turns, and together read every sample once an epoch.
    micro_batches = [each for turn in zip(*(result["read"] for result in results), strict=True) for each in turn]
    numbers = [number for _, *samples in micro_batches for number in samples]
    assert sorted(numbers[:NUM_SAMPLES]) == list(range(NUM_SAMPLES))
    if dp == 2:  # in whose batches there are two epochs
        assert sorted(numbers[NUM_SAMPLES : 2 * NUM_SAMPLES]) == list(range(NUM_SAMPLES))
    assert {json.dumps(result["metrics"]) for result in results} == {json.dumps(results[0]["metrics"])}


class Idle(PointsTrial):
    """Trains on nothing."""

    def train_batch(self, dataloader_iter: Iterator[Any] | None, epoch_idx: int, batch_idx: int) -> Any:
        self.num_batches = batch_idx + 1
        return {"loss": 0.5, "accuracy": 1.0}


def keep_periods(rank: int, folder: str) -> dict[str, Any]:
    trial = make_trial(f"{folder}/batches", Idle, accumulation=1)
    settings = {"reporting_period": Batch(100), "checkpoint_period": Batch(250), "validation_period": Batch(70)}
    settings |= {"checkpoint_policy": "none"}
    fit(trial, max_length=Batch(620), **settings)
    again = make_trial(f"{folder}/batches", Idle, accumulation=1)
    result = fit(again, max_length=Batch(1000), **settings)
    assert result.batch == 1000
    epochs = make_trial(f"{folder}/epochs", Idle)
    # An epoch has 11 micro-batches, of which a batch takes 3.
    assert fit(epochs, max_length=Epoch(7), reporting_period=Epoch(2), validation_period=Samples(30)).batch == 26
    for each in (trial, again, epochs):
        each.engine.destroy()
    return {"first": trial.seen.events, "second": again.seen.events, "epochs": epochs.seen.events}


def moments(events: list[str], event: str) -> list[int]:
    return [int(each.rpartition(" at ")[2]) for each in events if each.startswith(event)]


def test_periods_end_exactly_where_they_say_also_after_a_resume(gloo: GlooWorkers, tmp_path: Path) -> None:
    (events,) = gloo.run(1, keep_periods, str(tmp_path))
    # Each start reports, validates and saves at its end, too.
    both = {
        event: [*moments(events["first"], event), *moments(events["second"], event)]
        for event in ("workload_end", "validation_start", "save_start")
    }
    assert both["workload_end"] == [*range(100, 601, 100), 620, *range(700, 1001, 100)]
    assert both["validation_start"] == [*range(70, 561, 70), 620, *range(630, 981, 70), 1000]
    assert both["save_start"] == [250, 500, 620, 750, 1000]
    ends = [-(-11 * epoch // 3) for epoch in range(1, 8)]
    assert moments(events["epochs"], "epoch_end") == ends == [4, 8, 11, 15, 19, 22, 26]
    assert moments(events["epochs"], "workload_end") == [8, 15, 22, 26]
    # A batch has 6 samples.
    assert moments(events["epochs"], "validation_start") == [5, 10, 15, 20, 25, 26]
    lines = [json.loads(line) for line in (tmp_path / "batches" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == both["workload_end"]


EVENTS = """\
trial_startup 0 None at 0
validation_start at 0
validation_epoch_start at 0
validation_epoch_end {evaluations} at 0
validation_end at 0
training_start at 0
epoch_start 0 at 0
{epoch_end}workload_end at 2
validation_start at 2
validation_epoch_start at 2
validation_epoch_end {evaluations} at 2
validation_end at 2
save_start at 2
write_end ['config.yaml', 'manifest.json', 'model0'] at 2
upload_end step-00000002 at 2
trial_shutdown at 2
"""


class OnFullDisk(PointsTrial):
    """The second rank finds the disk full after batches 2 and 3."""

    def save(self, context: Any, path: Path) -> None:
        super().save(context, path)
        if context.distributed.rank == 1 and self.num_batches in (2, 3):
            raise OSError(errno.ENOSPC, "No space left on device")


def train_on_full_disk(rank: int, folder: str, on_error: str) -> tuple[str | None, list[str]]:
    trial = make_trial(folder, OnFullDisk)
    settings = {"checkpoint_period": Batch(1), "retention": Retention(1), "checkpoint_on_error": on_error}
    warnings: list[str] = []
    type(trial.seen).on_warning = lambda seen, message: warnings.append(message)  # type: ignore[method-assign]
    try:
        fit(trial, max_length=Batch(4), **settings)
        error = None
    except StorageError as failure:
        error = str(failure)
    torch.distributed.barrier()
    trial.engine.destroy()
    return error, [*warnings, *sorted(path.name for path in (Path(folder) / "checkpoints").iterdir())]


@pytest.mark.parametrize("on_error", ["stop", "warn"])
def test_all_ranks_go_on_or_stop_together_where_the_disk_of_one_is_full(
    gloo: GlooWorkers, tmp_path: Path, on_error: str
) -> None:
    for error, (*warnings, newest, latest) in gloo.run(2, train_on_full_disk, str(tmp_path), on_error):
        if on_error == "stop":
            assert error is not None
            assert "step-00000002.tmp: cannot be written: the disk is full" in error
            assert (warnings, newest, latest) == ([], "latest", "step-00000001")
        else:
            assert (error, newest, latest) == (None, "latest", "step-00000004")
            for batch, text in zip((2, 3), warnings, strict=True):
                assert f"step-0000000{batch}.tmp: cannot be written: the disk is full" in text
                assert text.endswith(f"the newest checkpoint is {tmp_path}/checkpoints/step-00000001")


def note_events(rank: int, folder: str) -> dict[str, Any]:
    trial = make_trial(folder)
    fit(trial, max_length=Batch(2), reporting_period=Batch(2), step_zero_validation=True)
    again = make_trial(folder)
    fit(again, max_length=Batch(2))
    return {"events": trial.seen.events, "again": again.seen.events, "validations": trial.seen.validations}


@pytest.mark.parametrize("dp", [1, 2])
def test_events_come_in_order_on_every_rank(gloo: GlooWorkers, tmp_path: Path, dp: int) -> None:
    results = gloo.run(dp, note_events, str(tmp_path))
    # Of three micro-batches, two replicas evaluate two and one.
    for result, evaluations in zip(results, [[3], [2, 1]][dp - 1], strict=True):
        # An epoch has 11 micro-batches, of which a batch of two replicas takes 6.
        epoch_end = "epoch_end 0 at 2\n" if dp == 2 else ""
        assert "\n".join(result["events"]) + "\n" == EVENTS.format(evaluations=evaluations, epoch_end=epoch_end)
        assert result["again"] == [
            "load_start {'note': 'kept'} at 0",
            "trial_startup 2 step-00000002 at 0",
            "trial_shutdown at 0",
        ]
        assert result["validations"] == results[0]["validations"]


class Evaluating(PointsTrial):
    """Evaluates in several ways, and reports values of all samples by reducers."""

    def __init__(self, context: Any) -> None:
        super().__init__(context)
        self.largest = context.wrap_reducer(max, name="largest")
        self.numbers = context.wrap_reducer(lambda values: {"count": len(values), "sum": sum(values)})

    def train_batch(self, dataloader_iter: Iterator[Any] | None, epoch_idx: int, batch_idx: int) -> Any:
        self.largest.update(100 + batch_idx)
        return super().train_batch(dataloader_iter, epoch_idx, batch_idx)

    def evaluation_reducer(self) -> Reducer | dict[str, Reducer]:
        return {"error": Reducer.AVG, "most": Reducer.MAX, "rows": Reducer.SUM}

    def evaluate_batch(self, dataloader_iter: Iterator[Any] | None, batch_idx: int) -> dict[str, Any]:
        assert dataloader_iter is not None
        assert not self.engine.module.training
        assert not torch.is_grad_enabled()
        numbers, features, targets = next(dataloader_iter)
        for number in numbers.tolist():
            self.largest.update(number)
            self.numbers.update(number)
        errors = (self.engine(features) - targets) ** 2
        return {"error": errors.mean(), "most": errors.max(), "rows": len(numbers)}


def evaluate(rank: int, folder: str) -> list[Any]:
    found = []
    for zero in (0, 3):
        trial = make_trial(f"{folder}/{zero}", Evaluating, zero=zero)
        # Validated at 1, in the middle of what is reported at 2.
        fit(trial, max_length=Batch(2), validation_period=Batch(1), reporting_period=Batch(2))
        with torch.no_grad():
            noisy = DataLoader(Points(5), batch_size=MICRO_BATCH, seed=trial.context.get_trial_seed())
            trial.engine.module.eval()
            errors = [(trial.engine(features) - targets) ** 2 for _, features, targets in noisy]
        whole = torch.cat(errors)
        found.append((trial.seen.validations, whole, trial.context.folder.metrics.read_text()))
        trial.engine.destroy()
    return found


@pytest.mark.parametrize("dp", [1, 2])
def test_every_validation_sample_counts_once_under_any_number_of_replicas(
    gloo: GlooWorkers, tmp_path: Path, dp: int
) -> None:
    for result in gloo.run(dp, evaluate, str(tmp_path)):
        for validations, errors, lines in result:
            assert len(validations) == 2
            metrics = validations[-1]
            assert metrics["error"] == pytest.approx(errors.mean().item(), rel=1e-6)
            assert metrics["most"] == pytest.approx(errors.max().item(), rel=1e-6)
            assert (metrics["rows"], metrics["largest"], metrics["count"], metrics["sum"]) == (5, 4, 5, 10)
            reports = [json.loads(line) for line in lines.splitlines()]
            # The validation between does not disturb what training reports.
            assert [each["largest"] for each in reports if "loss" in each] == [101]


class Losing(PointsTrial):
    """Its loss is not a number in the sixth and the tenth batch, on rank 1 alone."""

    def train_batch(self, dataloader_iter: Iterator[Any] | None, epoch_idx: int, batch_idx: int) -> Any:
        is_bad = batch_idx in (5, 9) and self.context.role.data_parallel_rank == 1
        return {"loss": float("nan") if is_bad else 0.5, "accuracy": float("inf")}


def warn_of_a_loss(rank: int, folder: str) -> list[str]:
    class Notes(TrialCallback):
        def on_warning(self, message: str) -> None:
            warnings.append(message)

    class Told(Losing):
        def build_callbacks(self) -> dict[str, TrialCallback]:
            return {"notes": Notes()}

    warnings: list[str] = []
    fit(make_trial(folder, Told), max_length=Batch(12), reporting_period=Batch(4), checkpoint_policy="none")
    return warnings


def test_a_loss_that_is_not_finite_is_told_once_with_its_batch_and_rank(gloo: GlooWorkers, tmp_path: Path) -> None:
    assert gloo.run(2, warn_of_a_loss, str(tmp_path)) == [["batch 6: loss is not finite on rank 1"]] * 2
