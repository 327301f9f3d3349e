"""The page of a run that is written while it trains."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pipekit.plan.run_folder import RunFolder
from pipekit.training.loggers import EventsFile
from pipekit.training.shipped import report
from pipekit.training.shipped.report import ReportFile
from pipekit.training.trial_loop import TrialResult


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    (tmp_path / "config.yaml").write_text("train: {steps: 2}\n")
    return RunFolder(tmp_path)


def test_pages_come_after_validations_and_checkpoints_now_and_then_and_at_the_end(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [100.0]
    monkeypatch.setattr(report.time, "monotonic", lambda: clock[0])
    page = ReportFile(folder, pytest.fail)
    page.on_trial_startup(0, None)

    def is_written() -> bool:
        found = folder.report.exists()
        folder.report.unlink(missing_ok=True)
        return found

    page.on_metrics(1, {"loss": 2.0})
    assert not is_written()
    page.on_metrics(1, {"loss": 2.0, "val_loss": 2.0})
    assert is_written()
    page.on_checkpoint_upload_end("step-00000001")
    assert not is_written(), "it is too early for another"
    clock[0] += 6
    page.on_checkpoint_upload_end("step-00000001")
    assert is_written()
    page.on_trial_shutdown()
    assert is_written()


def test_a_page_that_takes_long_is_written_seldom(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    clock, written = [100.0], list[float]()

    def write(*_: object) -> None:
        written.append(clock[0])
        clock[0] += 1

    monkeypatch.setattr(report.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(report, "write_run_page", write)
    page = ReportFile(folder, pytest.fail)
    page.on_trial_startup(0, None)
    for _ in range(3):
        page.on_checkpoint_upload_end("step-00000001")
        clock[0] += 101
    assert written == [100.0, 303.0]


def test_a_page_that_cannot_be_written_is_told_once(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("a fault of the page")

    monkeypatch.setattr(report, "write_run_page", fail)
    warnings: list[str] = []
    page = ReportFile(folder, warnings.append)
    page.on_trial_startup(0, None)
    page.on_metrics(1, {"val_loss": 1.0})
    page.on_trial_shutdown()
    assert warnings == [f"{folder.report}: a fault of the page; training goes on without its page"]


def test_a_start_that_never_begins_leaves_no_page_and_no_events(folder: RunFolder) -> None:
    ReportFile(folder, pytest.fail).on_trial_shutdown()
    EventsFile(folder, pytest.fail, "pp 1").on_trial_shutdown()
    assert not folder.report.exists()
    assert not folder.events.exists()


def test_events_of_earlier_starts_stay(folder: RunFolder) -> None:
    first = EventsFile(folder, pytest.fail, "pp 1")
    first.on_warning("slow disk")
    first.on_trial_startup(0, None)
    first.on_metrics(5, {})
    first.on_rollback(2)
    first.on_trial_shutdown()
    second = EventsFile(folder, pytest.fail, "pp 2")
    second.on_trial_startup(2, "step-00000002")
    second.on_metrics(9, {})
    second.on_training_end(TrialResult(9, None, None, None, 1.0))
    second.on_trial_shutdown()
    found = [json.loads(line) for line in folder.events.read_text().splitlines()]
    assert [(each["event"], each["step"], each["text"]) for each in found] == [
        ("warning", 0, "slow disk"),
        ("start", 0, "pp 1"),
        ("rollback", 5, "back to step 2"),
        ("stop", 2, ""),
        ("start", 2, "pp 2; going on from step-00000002"),
        ("end", 9, ""),
    ]
