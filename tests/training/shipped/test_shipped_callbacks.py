"""The shipped callbacks of a trial, switched on together: what each writes, shows and reports, on two replicas."""

from __future__ import annotations

import io
import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from gloo_workers import GlooWorkers
from html_pages import Page
from pipekit.errors import PipekitError
from pipekit.tensors.host_memory import resident_bytes
from pipekit.training.context import TrialContext
from pipekit.training.periods import Batch
from pipekit.training.shipped.learning_rate import LearningRate
from pipekit.training.shipped.loss_curve import draw_curves, read_curves
from pipekit.training.trial import Trial
from pipekit.training.trial_callbacks import TrialCallback
from trial_jobs import PointsTrial, fit

pytestmark = pytest.mark.distributed

ALL = {
    "early_stopping": {"patience": 2},
    "learning_rate": True,
    "memory": True,
    "throughput": True,
    "text_samples": {"prompts": ["a", "ü"]},
    "loss_curve": {"file": "curves.svg", "metrics": ["loss", "val_error"]},
    "tensorboard": True,
    "report": True,
    "wandb": {"project": "mine"},
    "trackio": {"project": "ours"},
}


class Telling(PointsTrial):
    """Continues texts, and holds 300 MB on its last rank."""

    def __init__(self, context: TrialContext) -> None:
        super().__init__(context)
        self.held = torch.ones(75_000_000) if context.distributed.rank == 1 else None

    def generate_text(self, prompt: str) -> str:
        assert not self.engine.module.training
        assert not torch.is_grad_enabled()
        return f"{prompt}!"


def configured(folder: str, kind: type[Trial], callbacks: dict[str, Any]) -> Any:
    return kind(TrialContext.from_config({"run": {"dir": folder, "device": "cpu"}, "callbacks": callbacks}))


class Recorder:
    """In place of a run of Weights & Biases."""

    def __init__(self) -> None:
        self.summary: dict[str, Any] = {}
        self.logged: list[dict[str, Any]] = []
        self.has_finished = False

    def log(self, metrics: dict[str, Any], step: int) -> None:
        self.logged.append({"step": step, **metrics})

    def finish(self) -> None:
        self.has_finished = True


def switch_all_on(rank: int, folder: str) -> dict[str, Any]:
    runs: list[dict[str, Any]] = []
    recorder = Recorder()
    sys.modules["wandb"] = SimpleNamespace(  # type: ignore[assignment]
        init=lambda **options: runs.append(options) or recorder,  # type: ignore[func-returns-value]
        Settings=dict,
        api=SimpleNamespace(api_key=None),
    )
    tracked = Recorder()
    sys.modules["trackio"] = SimpleNamespace(init=lambda **options: runs.append(options) or tracked)  # type: ignore[assignment, func-returns-value]
    trial = configured(folder, Telling, ALL)
    terminal = trial.context.terminal = io.StringIO()
    own_bytes = resident_bytes()
    fit(trial, max_length=Batch(4), reporting_period=Batch(1), validation_period=Batch(2), step_zero_validation=True)
    return {
        "terminal": terminal.getvalue(),
        "own_bytes": own_bytes,
        "logged": recorder.logged,
        "summary": recorder.summary,
        "finished": recorder.has_finished,
        "opened": [(run["project"], run.get("mode"), run["config"]["callbacks"]["wandb"]["project"]) for run in runs],
        "tracked": (tracked.logged, tracked.has_finished, [run.get("resume") for run in runs]),
    }


def test_all_of_them_switched_on_together(gloo: GlooWorkers, tmp_path: Path) -> None:
    first, second = gloo.run(2, switch_all_on, str(tmp_path))
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    trained = [record for record in records if "loss" in record]
    validated = [record for record in records if "val_error" in record]
    assert [record["step"] for record in trained] == [1, 2, 3, 4]
    assert [record["step"] for record in validated] == [0, 2, 4]
    assert {record["lr"] for record in trained} == {1e-2}
    # The rank that has the most counts.
    assert second["own_bytes"] > first["own_bytes"] + 250e6
    assert all(record["host_memory_bytes"] > first["own_bytes"] + 250e6 for record in trained)
    assert all(record["samples_per_s"] > 0 for record in trained[1:])

    lines = first["terminal"].splitlines()
    shown = [re.match(r"batch (\d)/4  (loss|val_error|saved) ", line) for line in lines]
    found = [(int(match[1]), match[2]) for match in shown if match]
    assert found[:3] == [(0, "val_error"), (1, "loss"), (2, "loss")]
    assert found[-1] == (4, "saved")
    assert f"  val_error {validated[1]['val_error']:.6g}  " in next(line for line in lines if "batch 2/4  loss" in line)
    loss = next(line for line in lines if line.startswith("batch 2/4  loss"))
    assert f"loss {trained[1]['loss']:.6g}  " in loss
    assert re.search(r"  ETA \d:\d\d$", loss)
    assert second["terminal"] == ""

    samples = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text(encoding="utf-8").splitlines()]
    assert samples == [
        {"step": step, "prompt": prompt, "text": f"{prompt}!"} for step in (0, 2, 4) for prompt in ("a", "ü")
    ]

    assert sorted(first["opened"]) == [("mine", "offline", "mine"), ("ours", None, "mine")]
    assert first["logged"] == records
    assert first["tracked"][:2] == (records, True)
    assert "never" in first["tracked"][2]
    summary = first["summary"]
    assert (summary["checkpoint"], summary["steps"]) == (str(tmp_path / "checkpoints" / "step-00000004"), 4)
    assert summary["val_error"] == records[-1]["val_error"]
    assert first["finished"]
    assert second["opened"] == second["logged"] == []

    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = event_accumulator.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("val_error")] == [
        (record["step"], pytest.approx(record["val_error"])) for record in validated
    ]
    assert [event.step for event in events.Scalars("samples_per_s")] == [2, 3, 4]
    assert {"_hparams_/experiment", "_hparams_/session_start_info"} <= set(events.Tags()["tensors"]) | set(
        events.summary_metadata
    )

    assert "</svg>" in (tmp_path / "curves.svg").read_text()
    page = Page((tmp_path / "report.html").read_text())
    assert [each["title"] for each in page.charts][:2] == ["Loss", "Learning rate"]
    assert [record["text"] for record in samples[-2:]] == [text for text in page.texts if text in ("a!", "ü!")][:2][
        ::-1
    ]
    assert read_curves(tmp_path / "metrics.jsonl", ["loss"]) == {
        "loss": ([1, 2, 3, 4], [record["loss"] for record in trained])
    }


WITHOUT_EVALUATION = type(
    "Blind",
    (Trial,),
    {
        "__init__": PointsTrial.__init__,
        "train_batch": PointsTrial.train_batch,
        "build_training_data_loader": PointsTrial.build_training_data_loader,
    },
)
WRONG: dict[str, tuple[type[Trial], str, Any, str]] = {
    "early stopping without validations": (
        WITHOUT_EVALUATION,
        "early_stopping",
        True,
        "Blind has no evaluation; write",
    ),
    "text of a trial that makes none": (
        PointsTrial,
        "text_samples",
        {"prompts": ["a"]},
        r"PointsTrial has no generate_text\(prompt\), which continues a text; write one, or leave text_samples out",
    ),
}


def switch_on_wrongly(rank: int, folder: str, case: str) -> None:
    kind, name, setting, message = WRONG[case]
    trial = configured(folder, kind, {name: setting, "progress": False})
    with pytest.raises(PipekitError, match=f"callbacks.{name}: {message}"):
        fit(trial, max_length=Batch(1))
    assert trial.num_batches == 0


@pytest.mark.parametrize("case", WRONG)
def test_what_a_callback_needs_is_said_before_training(gloo: GlooWorkers, tmp_path: Path, case: str) -> None:
    gloo.run(2, switch_on_wrongly, str(tmp_path), case)


class Metered(TrialCallback):
    """Reports what the test wants."""

    def __init__(self, trial: Any) -> None:
        self.trial = trial

    def training_metrics(self) -> dict[str, float]:
        if self.trial.context.distributed.rank == 1 and self.trial.num_batches == 2:
            raise ValueError("no meter")
        return {"metered": float(self.trial.num_batches)}


class MeteredTrial(PointsTrial):
    def build_callbacks(self) -> dict[str, TrialCallback]:
        # Takes the place of the shipped one of that name.
        return {"memory": Metered(self)}


def meter(rank: int, folder: str) -> None:
    trial = configured(folder, MeteredTrial, {"memory": True, "progress": False})
    with pytest.raises(PipekitError, match="callback 'memory': training_metrics raised ValueError: no meter"):
        fit(trial, max_length=Batch(2), reporting_period=Batch(1))


def test_a_callback_of_the_trial_reports_numbers_and_its_exception_ends_all_ranks(
    gloo: GlooWorkers, tmp_path: Path
) -> None:
    gloo.run(2, meter, str(tmp_path))
    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert set(json.loads(line)) == {"step", "loss", "metered"}
    assert json.loads(line)["metered"] == 1.0


def test_learning_rates_have_names_where_there_are_several() -> None:
    engine, other = (
        SimpleNamespace(view=SimpleNamespace(param_groups=[{"lr": rate} for rate in rates]))
        for rates in ([0.1, 0.2], [0.3])
    )
    context: Any = SimpleNamespace(models=[engine, other])
    assert LearningRate(context).training_metrics() == {
        "lr_model0_group0": 0.1,
        "lr_model0_group1": 0.2,
        "lr_model1": 0.3,
    }
    context.models = [engine]
    assert LearningRate(context).training_metrics() == {"lr_group0": 0.1, "lr_group1": 0.2}


def test_curves_are_drawn_where_their_values_are(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(
        '{"step": 1, "loss": 4.0, "lr": 1}\n{"step": 2, "loss": null}\n{"step": 3, "loss": 1.0}\n'
        '{"step": 3, "val_loss": 2}\n{"step": 5, "loss": 2.5}\n{"st'
    )
    curves = read_curves(path)
    assert curves == {"loss": ([1, 3, 5], [4.0, 1.0, 2.5]), "val_loss": ([3], [2])}
    assert read_curves(path, ["lr", "none"]) == {"lr": ([1], [1])}
    draw_curves(tmp_path / "a.svg", curves)
    (line,) = re.findall(r'<g id="loss">\s*<path d="([^"]+)"', (tmp_path / "a.svg").read_text())
    points = [tuple(map(float, point)) for point in re.findall(r"[ML] ([\d.]+) ([\d.]+)", line)]
    (x1, y1), (x2, y2), (x3, y3) = points
    assert x2 - x1 == pytest.approx(x3 - x2)
    # A picture's y points down: 2.5 is half way between 4 and 1.
    assert y3 == pytest.approx((y1 + y2) / 2)
    assert y2 > y1
    draw_curves(tmp_path / "a.png", curves)
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(each.name for each in tmp_path.iterdir()) == ["a.png", "a.svg", "metrics.jsonl"]
