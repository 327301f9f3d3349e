"""Runs of `pipekit train` in which a rank fails, hangs, drifts or has no numbers: all end, and the rank is named."""

from __future__ import annotations

from pathlib import Path

import pytest

from html_pages import Page
from train_runs import metrics, pipekit, ranks_of, write_workspace

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a text, a configuration and a cache, shared by the module."""
    return write_workspace(tmp_path_factory.mktemp("train"))


FAILING_TRIAL = """
import os, signal, time
from pipekit.training.language_model import LanguageModelTrial

class Failing(LanguageModelTrial):
    calls = 0

    def loss(self, outputs, labels):
        Failing.calls += 1
        if self.context.mpu.is_last_stage and Failing.calls > 2 * 4:
            self.fail()
        return super().loss(outputs, labels)

class Raises(Failing):
    def fail(self):
        raise ZeroDivisionError("the third step divides by zero")

class Dies(Failing):
    def fail(self):
        os.kill(os.getpid(), signal.SIGKILL)

class Stops(Failing):
    def fail(self):
        if Failing.calls > 8 * 4:
            time.sleep(1)  # a heartbeat is written meanwhile
            os.kill(os.getpid(), signal.SIGSTOP)

class NotANumber(LanguageModelTrial):
    calls = 0

    def loss(self, outputs, labels):
        NotANumber.calls += 1
        bad = NotANumber.calls > 2 * 4 and NotANumber.calls % 4 == 2
        return super().loss(outputs, labels) * (float("nan") if bad else 1.0)

class Sleeps(Failing):
    def fail(self):
        if Failing.calls > 8 * 4:
            time.sleep(3600)
"""


@pytest.mark.parametrize(
    ("trial", "message"),
    [
        ("Raises", "rank 1 failed: ZeroDivisionError: the third step divides by zero"),
        ("Dies", "rank 1 was killed by SIGKILL"),
    ],
)
def test_a_rank_that_fails_in_step_3_ends_all_and_is_named(workspace: Path, trial: str, message: str) -> None:
    (workspace / "failing.py").write_text(FAILING_TRIAL)
    run = f"runs/{trial}"
    overrides = (f"run.trial=failing:{trial}", f"run.dir={run}", "train.eval_interval=null")
    done = pipekit(workspace, "train", "c.yaml", *overrides)
    assert done.returncode == 3
    assert done.stderr.startswith(f"error: {message}")
    assert [record["step"] for record in metrics(workspace, run)] == [1, 2]


def test_a_run_that_ends_in_losses_that_are_not_finite_has_failed_and_says_where_it_began(workspace: Path) -> None:
    (workspace / "failing.py").write_text(FAILING_TRIAL)
    run, where = (
        "runs/nan",
        "the loss is nan; the first number that is not finite is in the loss, on rank 1 (stage 1), ",
    )
    overrides = ("run.trial=failing:NotANumber", f"run.dir={run}", "train.eval_interval=null", "train.steps=5")
    done = pipekit(workspace, "train", "c.yaml", *overrides, "checkpoint.interval=2")
    assert done.returncode == 6
    assert f"warning: step 3: {where}in micro-batch 1. The step has changed nothing" in done.stdout
    assert "step 5: the loss or the gradient was not finite in the last 3 steps" in done.stderr
    assert f"It began in step 3: {where}in micro-batch 1. What helps: lower optimizer.lr=0.003" in done.stderr
    assert [record["loss"] is None for record in metrics(workspace, run)] == [False, False, True, True, True]
    assert "Trained" not in done.stdout
    assert not (workspace / run / "checkpoints/step-00000005").exists()


@pytest.mark.slow  # the monitor's and the launcher's own tests need less time for it
@pytest.mark.parametrize(
    ("trial", "fault"),
    [
        ("Stops", "has not been heard from for"),
        ("Sleeps", "waits for nobody, and has been computing 1F0 for"),
    ],
)
def test_a_rank_that_hangs_in_step_9_is_named_early_and_ends_all_at_the_limit(
    workspace: Path, trial: str, fault: str
) -> None:
    (workspace / "failing.py").write_text(FAILING_TRIAL)
    run = f"runs/{trial}"
    overrides = (f"run.trial=failing:{trial}", f"run.dir={run}", "train.eval_interval=null", "run.timeout_s=8")
    done = pipekit(workspace, "train", "c.yaml", *overrides)
    assert done.returncode == 4
    warning, error, *report = done.stderr.splitlines()
    assert warning.startswith("warning: step 9 has lasted 5 s (10 usual steps take ")
    assert error.startswith(f"error: the run hangs: rank 1 (stage 1) {fault} ")
    assert "computing 1F0" in warning
    assert "computing 1F0" in error
    assert error.endswith("; rank 0 waits for it")
    table = [line.split() for line in report[1:4]]
    assert table[0][:3] == ["rank", "stage", "phase"]
    assert table[1][:9] == ["0", "0", "step", "9", "receiving", "the", "input", "gradient", "of"]
    assert table[1][-3] == "1"
    assert table[2][:6] == ["1", "1", "step", "9", "computing", "1F0"]
    assert report[-1] == f"saved in {workspace}/{run}/logs/hang.txt"
    assert (workspace / run / "logs" / "hang.txt").read_text().startswith("the run hangs: rank 1 (stage 1)")
    assert not ranks_of(run)
    assert not list((workspace / run / "logs").glob("*.heartbeat.json"))
    assert pipekit(workspace, "report", run).returncode == 0
    page = Page((workspace / run / "report.html").read_text())
    assert warning.removeprefix("warning: ") in page.texts
    assert page.texts.index("stall") > page.texts.index("failure")  # the newest stands first


DRIFTING_TRIAL = """
from pipekit.training.language_model import LanguageModelTrial

class Drifting(LanguageModelTrial):
    def learning_rate(self, step):
        return super().learning_rate(step) * (1 + self.context.mpu.data_parallel_rank)
"""


@pytest.mark.parametrize(
    ("interval", "steps"),
    [("3", [1, 2]), pytest.param("null", [1, 2, 3, 4], marks=pytest.mark.slow)],
)
def test_replicas_that_drift_apart_end_the_run_before_a_checkpoint(
    workspace: Path, interval: str, steps: list[int]
) -> None:
    (workspace / "drifting.py").write_text(DRIFTING_TRIAL)
    run = f"runs/drifting-{interval}"
    overrides = ("run.trial=drifting:Drifting", f"run.dir={run}", f"train.check_replicas={interval}", "parallel.pp=1")
    overrides += ("parallel.dp=2", "parallel.zero=0", "train.steps=4", "train.eval_interval=null")
    done = pipekit(workspace, "train", "c.yaml", *overrides, "checkpoint.interval=3")
    assert [record["step"] for record in metrics(workspace, run)] == steps
    if interval == "null":
        assert done.returncode == 0, done.stderr
        return
    assert done.returncode == 6
    assert "after step 3, copies that must be equal on all ranks that hold them are not:" in done.stderr
    assert "  embed.weight: rank 1 differs from rank 0 (data-parallel replicas)" in done.stderr
    assert not list((workspace / run / "checkpoints").glob("step-*"))
