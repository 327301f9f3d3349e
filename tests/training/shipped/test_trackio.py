"""Metrics in trackio: a stand-in takes them down, and trackio itself stores them, where it is installed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextvars import ContextVar
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fork_server import run_script
from pipekit.config.callbacks_config import TrackioConfig
from pipekit.plan.run_folder import RunFolder
from pipekit.training.loggers import log_evaluation
from pipekit.training.shipped.trackio import TrackioLogger


@pytest.mark.parametrize(("first_step", "resume"), [(0, "never"), (5, "allow")])
def test_a_run_that_goes_on_goes_on_in_its_run_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], first_step: int, resume: str
) -> None:
    current: ContextVar[bool] = ContextVar("current", default=False)
    opened: list[dict[str, Any]] = []
    logged: list[tuple[dict[str, Any], int]] = []

    def init(**options: Any) -> Any:
        print("a greeting")
        current.set(True)
        opened.append(options)
        return SimpleNamespace(
            log=lambda metrics, step: logged.append((metrics, step)), finish=lambda: print("a farewell")
        )

    monkeypatch.setitem(sys.modules, "trackio", SimpleNamespace(init=init))  # type: ignore[arg-type]
    logger = TrackioLogger(TrackioConfig(project="mine", space="me/runs"), RunFolder(tmp_path / "a"), {"seed": 1})
    logger.on_trial_startup(first_step, None)
    logger.on_metrics(first_step + 1, {"loss": 2.0})
    logger.on_trial_shutdown()
    options = opened[0]
    assert (options["project"], options["name"], options["space_id"]) == ("mine", "a", "me/runs")
    assert (options["resume"], options["config"]) == (resume, {"seed": 1})
    assert logged == [({"loss": 2.0}, first_step + 1)]
    config: Any = SimpleNamespace(
        logging=SimpleNamespace(tensorboard=False, wandb=None, trackio=TrackioConfig(project="mine"))
    )
    log_evaluation(RunFolder(tmp_path), config, {"step": 9}, {"loss": 1.5})
    assert (opened[1]["resume"], logged[1]) == ("allow", ({"eval/loss": 1.5}, 9))
    assert capsys.readouterr().out == ""
    # The current run of trackio is ended, with a word about it, when the process exits.
    assert not current.get()


TRACKED = """
import os
os.environ.update(TRACKIO_DIR="tracked", HF_HUB_OFFLINE="1")
from pathlib import Path
from pipekit.config.callbacks_config import TrackioConfig
from pipekit.plan.run_folder import RunFolder
from pipekit.training.shipped.trackio import TrackioLogger

for first_step, num_steps in ((0, 2), (2, 4)):
    settings = {"train": {"steps": num_steps}}
    logger = TrackioLogger(TrackioConfig(project="mine"), RunFolder(Path("runs/first")), settings)
    logger.on_trial_startup(first_step, None)
    for step in range(first_step + 1, num_steps + 1):
        logger.on_metrics(step, {"loss": 10.0 - step, "grad_norm": float("nan")})
    logger.on_trial_shutdown()
"""


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.skipif(find_spec("trackio") is None, reason="needs trackio: pip install trackio")
def test_trackio_has_the_metrics_the_configuration_and_one_run_that_goes_on(tmp_path: Path) -> None:
    (tmp_path / "tracked.py").write_text(TRACKED)
    done = run_script(tmp_path / "tracked.py", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr

    def ask(*question: str) -> Any:
        command = [sys.executable, "-m", "trackio.cli", *question, "--project", "mine", "--json"]
        environ = {**os.environ, "TRACKIO_DIR": str(tmp_path / "tracked"), "HF_HUB_OFFLINE": "1"}
        answer = subprocess.run(command, env=environ, capture_output=True, text=True, check=True, timeout=60)
        return json.loads(answer.stdout)

    assert ask("list", "runs")["runs"] == ["first"]
    losses = ask("get", "metric", "--run", "first", "--metric", "loss")["values"]
    assert [(value["step"], value["value"]) for value in losses] == [(step, 10.0 - step) for step in (1, 2, 3, 4)]
    assert ask("get", "run", "--run", "first")["config"]["train"] == {"steps": 4}
