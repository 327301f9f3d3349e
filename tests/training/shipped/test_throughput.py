"""Throughput and MFU of a trial: against operations that are counted by hand, and a clock that the test turns."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from gloo_workers import GlooWorkers
from pipekit.training.context import TrialContext
from pipekit.training.periods import Batch
from pipekit.training.shipped import throughput
from pipekit.training.trial import Trial
from trial_jobs import ACCUMULATION, FEATURES, MICRO_BATCH, PipelineTrial, PointsTrial, fit

pytestmark = pytest.mark.distributed

PEAK_FLOPS = 1e9
# A forward multiplies each sample by a weight of 4 x 8, and by one of 8 x 1; its backward makes twice as many products.
FLOPS_OF_SAMPLE = 3 * 2 * (FEATURES * 8 + 8)


def measure(rank: int, folder: str, kind: type[Trial], hparams: dict[str, int]) -> dict[str, Any]:
    settings = {"tokens_per_sample": 7, "peak_flops": PEAK_FLOPS}
    config = {
        "hyperparameters": hparams,
        "run": {"dir": folder, "device": "cpu"},
        "callbacks": {"throughput": settings, "progress": False},
    }
    result = fit(kind(TrialContext.from_config(config)), max_length=Batch(3), reporting_period=Batch(1))
    metrics: dict[str, Any] = result.metrics
    return metrics


@pytest.mark.parametrize(
    ("kind", "hparams", "ranks"),
    [
        (PointsTrial, {"zero": 1}, 1),
        (PointsTrial, {"zero": 3}, 2),
        (PipelineTrial, {"pp": 2}, 2),
        (PipelineTrial, {"pp": 2, "schedule": "zb-h1"}, 2),
    ],
    ids=["alone", "ZeRO-3", "pipeline", "zero bubble"],
)
def test_mfu_is_the_operations_of_the_samples_over_the_peak_of_all_devices(
    gloo: GlooWorkers, tmp_path: Path, kind: type[Trial], hparams: dict[str, int], ranks: int
) -> None:
    results = gloo.run(ranks, measure, str(tmp_path), kind, hparams)
    for metrics in results:
        assert metrics == results[0]
        assert metrics["samples_per_s"] > 0
        assert metrics["tokens_per_s"] == pytest.approx(7 * metrics["samples_per_s"])
        flops_per_s = metrics["samples_per_s"] * FLOPS_OF_SAMPLE
        assert metrics["mfu"] == pytest.approx(flops_per_s / (PEAK_FLOPS * ranks))
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    # The first batch warms up.
    assert ["samples_per_s" in line for line in lines if '"loss"' in line] == [False, True, True]


def test_there_is_no_mfu_under_tensor_parallelism(gloo: GlooWorkers, tmp_path: Path) -> None:
    for metrics in gloo.run(2, measure, str(tmp_path), PipelineTrial, {"tp": 2}):
        assert metrics["samples_per_s"] > 0
        assert "mfu" not in metrics


class Clock:
    now_s = 0.0

    def perf_counter(self) -> float:
        return self.now_s


class Timed(PointsTrial):
    """A batch takes 2 s by a clock of its own, a validation 100 s, and a checkpoint 1000 s."""

    clock = Clock()

    def train_batch(self, *args: Any) -> Any:
        self.clock.now_s += 2 / ACCUMULATION
        return super().train_batch(*args)

    def evaluate_batch(self, *args: Any) -> dict[str, Any]:
        self.clock.now_s += 100
        return super().evaluate_batch(*args)

    def save(self, context: TrialContext, path: Path) -> None:
        self.clock.now_s += 1000
        super().save(context, path)


def turn_the_clock(rank: int, folder: str) -> Any:
    throughput.time = Timed.clock  # type: ignore[assignment]
    config = {"run": {"dir": folder, "device": "cpu"}, "callbacks": {"throughput": True}}
    trial = Timed(TrialContext.from_config(config))
    result = fit(
        trial, max_length=Batch(5), reporting_period=Batch(5), validation_period=Batch(2), checkpoint_period=Batch(3)
    )
    return result.metrics


def test_validations_and_checkpoints_are_not_part_of_the_time(gloo: GlooWorkers, tmp_path: Path) -> None:
    (metrics,) = gloo.run(1, turn_the_clock, str(tmp_path))
    assert metrics["samples_per_s"] == pytest.approx(MICRO_BATCH * ACCUMULATION / 2)
    # Nothing is known of the tokens, nor of the peak of a CPU.
    assert set(metrics) == {"loss", "samples_per_s"}
