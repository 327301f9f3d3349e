"""Checkpoints of a run: when they are written and waited for, and what a full or slow disk changes."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fake_layers_run import Events
from pipekit.engine.save import PendingCheckpoint
from pipekit.errors import StoppedError, StorageError
from pipekit.hangs.activity import Activity
from pipekit.training.slow_saves import SlowSaves
from pipekit.training.trial_saves import TrialSaves


def test_checkpoints_come_at_their_interval_and_at_the_end(run: Any) -> None:
    made = run(train={"steps": 5}, checkpoint={"interval": 2})
    made.fit()
    assert [(state.step, state.consumed_samples) for state in made.saved] == [(2, 8), (4, 16), (5, 20)]
    assert [state.metrics["loss"] for state in made.saved] == [8.0, 6.0, 5.0]


@pytest.mark.parametrize("in_background", [False, True])
def test_a_save_in_the_background_is_waited_for_before_the_next_and_at_the_end(run: Any, in_background: bool) -> None:
    made = run(train={"steps": 5}, checkpoint={"interval": 2, "async": in_background})
    result = made.fit()
    assert made.order == [f"{event} {step}" for step in (2, 4, 5) for event in ("save", "waited for")]
    assert result.checkpoint.name == "step-5"
    reported = [name for name in made.events.names if name.startswith(("checkpoint", "step"))]
    # What is written in the background is reported when it is waited for.
    at = reported.index("checkpoint 2")
    assert reported[at - 1] == ("step 4" if in_background else "step 2")


def test_a_save_in_the_background_is_written_out_where_training_fails(run: Any) -> None:
    made = run(train={"steps": 5}, checkpoint={"interval": 2, "async": True}, events=Events(fails_at=3))
    with pytest.raises(OSError, match="disk is full"):
        made.fit()
    assert made.order == ["save 2", "settled"]


@pytest.mark.parametrize("in_background", [False, True])
def test_a_full_disk_is_told_and_the_run_goes_on_if_told_so(run: Any, in_background: bool) -> None:
    settings = {"interval": 2, "async": in_background, "on_error": "warn"}
    made = run(train={"steps": 8}, checkpoint=settings, full_at=(4,))
    assert made.fit().checkpoint.name == "step-8"
    assert made.events.warnings == [
        "step-4: cannot be written: the disk is full; training goes on, and saves again when that is due; the newest "
        f"checkpoint is {made.run.run.folder.checkpoints}/step-2"
    ]
    assert [name for name in made.events.names if "checkpoint" in name] == [f"checkpoint {step}" for step in (2, 6, 8)]


@pytest.mark.parametrize("in_background", [False, True])
@pytest.mark.parametrize(("on_error", "full_at"), [("stop", 4), ("warn", 8)])
def test_a_full_disk_ends_the_run_where_not_told_so_and_after_the_last_step(
    run: Any, in_background: bool, on_error: str, full_at: int
) -> None:
    settings = {"interval": 4, "async": in_background, "on_error": on_error}
    made = run(train={"steps": 8}, checkpoint=settings, full_at=(full_at,))
    with pytest.raises(StorageError, match=f"^step-{full_at}: cannot be written: the disk is full$"):
        made.fit()
    assert made.events.warnings == []
    assert [name for name in made.events.names if "checkpoint" in name] == (["checkpoint 4"] if full_at == 8 else [])


@pytest.mark.parametrize("is_full_for_ever", [False, True])
def test_a_stop_after_a_save_that_has_failed_saves_again(run: Any, is_full_for_ever: bool) -> None:
    full_at = {2}

    class Stopping(Events):
        def on_warning(self, message: str) -> None:
            super().on_warning(message)
            os.kill(os.getpid(), signal.SIGTERM)
            if not is_full_for_ever:
                full_at.clear()

    settings = {"interval": 2, "on_error": "warn"}
    made = run(train={"steps": 8}, checkpoint=settings, full_at=full_at, events=Stopping())
    with pytest.raises(StorageError if is_full_for_ever else StoppedError, match="step-2"):
        made.fit()
    assert made.order[:2] == ["save 2", "save 2"]
    assert [state.step for state in made.saved] == ([] if is_full_for_ever else [2])


@pytest.mark.parametrize("in_background", [False, True])
def test_a_slow_disk_is_told_once_with_what_to_do(
    run: Any, monkeypatch: pytest.MonkeyPatch, in_background: bool
) -> None:
    monkeypatch.setattr(SlowSaves, "end", lambda saves: (20.0, 100.0))
    made = run(train={"steps": 8}, checkpoint={"interval": 2, "async": in_background})
    made.fit()
    background = "" if in_background else "set checkpoint.async=true, or "
    (warning,) = made.events.warnings
    assert warning.startswith("step 2: training stood still for 20.0 of the last 100.0 s to save")
    assert warning.endswith(f"; {background}give a longer checkpoint.interval or a run.dir on a faster disk")


def test_the_only_save_of_a_run_is_not_told(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SlowSaves, "end", lambda saves: (20.0, 100.0))
    made = run(train={"steps": 8})
    made.fit()
    assert made.events.warnings == []


def test_a_checkpoint_that_came_by_time_goes_when_a_newer_one_is_on_the_disk(alone: None, tmp_path: Path) -> None:
    context: Any = SimpleNamespace(activity=Activity(), distributed=SimpleNamespace(rank=0))
    callbacks: Any = SimpleNamespace(call=lambda *event: None)
    requests: Any = SimpleNamespace(note_save=lambda: None, note_written=lambda seconds: None)
    saves = TrialSaves(context, callbacks, requests, on_error="warn", unit="batch", how_to_save_faster="")

    def save(batch: int, *, by_time: bool = True, is_full: bool = False, in_background: bool = False) -> set[int]:
        """Save after a batch; the batches of the checkpoints that are there then."""
        path = tmp_path / str(batch)

        def write() -> None:
            if is_full:
                error = StorageError("the disk is full")
                error.is_everyones = True
                raise error
            path.mkdir()

        def begin() -> PendingCheckpoint:
            return PendingCheckpoint(path, write, in_background=in_background)

        saves.save(batch, begin, is_temporary=by_time, is_final=False)
        return {int(path.name) for path in tmp_path.iterdir()}

    assert save(1) == {1}
    assert save(2, is_full=True) == {1}
    assert save(3, by_time=False) == {3}
    assert save(4) == {3, 4}
    assert save(5) == {3, 5}
    # That it has failed is known when the next one is due.
    save(6, is_full=True, in_background=True)
    assert save(7) == {3, 7}
    save(8, in_background=True)
    assert {path.name for path in tmp_path.iterdir()} >= {"3", "7"}, "until the newer one is waited for"
    saves.finish()
    assert {path.name for path in tmp_path.iterdir()} == {"3", "8"}
