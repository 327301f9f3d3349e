"""Metrics in trackio, which a stand-in takes down."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pipekit.config.callbacks_config import TrackioConfig
from pipekit.plan.run_folder import RunFolder
from pipekit.training.shipped.trackio import TrackioLogger


@pytest.mark.parametrize(("first_step", "resume"), [(0, "never"), (5, "allow")])
def test_a_run_that_goes_on_goes_on_in_its_run_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], first_step: int, resume: str
) -> None:
    opened: list[dict[str, Any]] = []
    logged: list[tuple[dict[str, Any], int]] = []

    def init(**options: Any) -> Any:
        print("a greeting")
        opened.append(options)
        return SimpleNamespace(
            log=lambda metrics, step: logged.append((metrics, step)), finish=lambda: print("a farewell")
        )

    monkeypatch.setitem(sys.modules, "trackio", SimpleNamespace(init=init))  # type: ignore[arg-type]
    logger = TrackioLogger(TrackioConfig(project="mine", space="me/runs"), RunFolder(tmp_path / "a"), {"seed": 1})
    logger.on_trial_startup(first_step, None)
    logger.on_metrics(first_step + 1, {"loss": 2.0})
    logger.on_trial_shutdown()
    (options,) = opened
    assert (options["project"], options["name"], options["space_id"]) == ("mine", "a", "me/runs")
    assert (options["resume"], options["config"]) == (resume, {"seed": 1})
    assert logged == [({"loss": 2.0}, first_step + 1)]
    assert capsys.readouterr().out == ""
