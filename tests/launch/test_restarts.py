"""When a run is started again, when it is not, and what is said and written down about it."""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from pipekit.checkpoint.manifest import checkpoint_name
from pipekit.errors import CommunicationError, ConfigError, NumbersError, PipekitError, StorageError
from pipekit.launch.environment import RankEnvironment
from pipekit.launch.failures import HangError, RankError, RankFailure
from pipekit.launch.restarts import start_until_done, warn_of_restarts
from pipekit.signals import Interrupted


def killed(rank: int = 1) -> RankError:
    return RankError(RankFailure(rank, -9, 0.0, None, Path("/none"), phase="step 7"))


def save(folder: Path, step: int) -> None:
    checkpoint = folder / "checkpoints" / checkpoint_name(step)
    checkpoint.mkdir(parents=True, exist_ok=True)
    (checkpoint / "manifest.json").write_text("{}")
    (folder / "checkpoints/latest").write_text(checkpoint.name)


Event = int | Exception
"""A checkpoint's step, or how a start ends."""


def run(
    folder: Path, starts: Sequence[Sequence[Event]], *, restarts: int, is_known: bool = True
) -> tuple[list[bool], PipekitError | None]:
    """Go through starts; return what each was told, and the last error."""
    told: list[bool] = []

    def start(goes_on: bool) -> None:
        told.append(goes_on)
        for event in starts[len(told) - 1]:
            if isinstance(event, Exception):
                raise event
            save(folder, event)

    checkpoints = folder / "checkpoints" if is_known else None
    try:
        start_until_done(
            start, restarts=restarts, failures=folder / "failures.jsonl", checkpoints=checkpoints, pause_s=0
        )
    except PipekitError as error:
        return told, error
    return told, None


def records(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "failures.jsonl").read_text().splitlines()]


def test_it_goes_on_and_says_what_failed_where_and_how_often(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hang = HangError("the run hangs: rank 0 waits for nobody\nrank  doing")
    assert run(tmp_path, [[2, killed()], [4, hang], [6]], restarts=3) == ([False, True, True], None)
    first, second = records(tmp_path)
    assert first == {
        "time": first["time"],
        "failure": 1,
        "kind": "rank_lost",
        "rank": 1,
        "host": socket.gethostname(),
        "phase": "step 7",
        "message": "rank 1 was killed by SIGKILL; out of memory?",
        "checkpoint": "step-00000002",
        "then": "restart 1 of 3, from step-00000002",
    }
    assert (second["kind"], second["failure"], second["rank"]) == ("hang", 2, None)
    assert capsys.readouterr().err.splitlines() == [
        "rank 1 was killed by SIGKILL; out of memory?, last seen in step 7; restart 1 of 3, from step-00000002 (see "
        f"{tmp_path}/failures.jsonl)",
        f"the run hangs: rank 0 waits for nobody; restart 2 of 3, from step-00000004 (see {tmp_path}/failures.jsonl)",
    ]


@pytest.mark.parametrize(
    ("starts", "restarts", "num_starts", "says"),
    [
        # Nothing new: the second failure is the last.
        ([[2, killed()], [killed()], []], 9, 2, "failed twice after step-00000002 without a newer checkpoint"),
        ([[killed()], [killed()], []], 9, 2, "failed twice before the first checkpoint without a newer checkpoint"),
        # Progress, and then none.
        ([[2, killed()], [4, killed()], [killed()], []], 9, 3, "failed twice after step-00000004 without"),
        # The same step, written again, is progress: the run was set back.
        ([[2, killed()], [2, killed()], [2]], 9, 3, None),
        # Progress each time, and no restart left.
        ([[2, killed()], [4, killed()], [6, killed()], []], 2, 3, "started 3 times, which is all that restarts=2"),
        ([[2, killed()], []], 0, 1, None),
    ],
)
def test_the_number_of_starts(
    tmp_path: Path, starts: Sequence[Sequence[Event]], restarts: int, num_starts: int, says: str | None
) -> None:
    told, error = run(tmp_path, starts, restarts=restarts)
    assert len(told) == num_starts
    assert (error is None) == (not starts[num_starts - 1] or not isinstance(starts[num_starts - 1][-1], Exception))
    if error is not None:
        assert str(error).startswith("rank 1 was killed by SIGKILL")
        assert str(error).splitlines()[-1].startswith(says or "the whole log of rank 1")
        assert records(tmp_path)[-1]["then"] == "the end"
    assert len(records(tmp_path)) == num_starts - (error is None)


def test_the_page_that_a_run_keeps_tells_of_its_failure(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("train: {steps: 9}\n")
    page = tmp_path / "report.html"

    def start(goes_on: bool) -> None:
        raise killed()

    def fail() -> None:
        with pytest.raises(RankError):
            start_until_done(
                start, restarts=0, failures=tmp_path / "failures.jsonl", checkpoints=None, page=page, pause_s=0
            )

    fail()
    assert not page.exists()
    page.write_text("old")
    fail()
    assert page.read_text().count("rank 1 was killed by SIGKILL; out of memory?; then the end") == 2
    # The error that is told is that of the run, whatever is wrong with its page.
    page.unlink()
    page.mkdir()
    fail()


def test_a_checkpoint_from_before_the_first_start_is_no_progress(tmp_path: Path) -> None:
    """A run may have been told to begin at another checkpoint than the newest."""
    save(tmp_path, 8)
    assert run(tmp_path, [[killed()], [killed()], []], restarts=5)[0] == [False, False]
    assert run(tmp_path, [[killed()], [4, killed()], []], restarts=5)[0] == [False, False, True]


@pytest.mark.parametrize(
    "error", [ConfigError("x"), NumbersError("x"), StorageError("x"), Interrupted(15, "x"), KeyboardInterrupt()]
)
def test_what_a_start_would_not_change_and_requests_end_it(tmp_path: Path, error: BaseException) -> None:
    starts: list[bool] = []

    def start(goes_on: bool) -> None:
        starts.append(goes_on)
        raise error

    with pytest.raises(type(error)):
        start_until_done(start, restarts=5, failures=tmp_path / "failures.jsonl", checkpoints=None, pause_s=0)
    assert len(starts) == 1
    assert list(tmp_path.iterdir()) == []


def test_a_signal_between_two_starts_ends_it_and_says_what_was_next(tmp_path: Path) -> None:
    starts: list[bool] = []
    handler = signal.getsignal(signal.SIGTERM)

    def send() -> None:
        deadline_s = time.monotonic() + 60
        while signal.getsignal(signal.SIGTERM) == handler:
            if time.monotonic() > deadline_s:
                return  # nobody listens, and the signal would end the tests
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    def start(goes_on: bool) -> None:
        starts.append(goes_on)
        raise killed()

    sender = threading.Thread(target=send)
    sender.start()
    with pytest.raises(Interrupted, match=r"^stopped by SIGTERM; next was restart 1 of 2, from the start$") as caught:
        start_until_done(start, restarts=2, failures=tmp_path / "failures.jsonl", checkpoints=None, pause_s=8)
    sender.join()
    assert caught.value.exit_code == 143
    assert starts == [False]


def test_where_checkpoints_are_not_known_the_number_is_the_limit(tmp_path: Path) -> None:
    lost = CommunicationError("rank 1 is gone")
    told, error = run(tmp_path, [[lost]] * 9, restarts=3, is_known=False)
    assert (told, error) == ([False] * 4, lost)


@pytest.mark.parametrize(
    ("launcher", "rank", "restarts", "said"),
    [
        ("torchrun", 0, 2, "run.restarts=2 is ignored: starting ranks again is left to torchrun with --max-restarts\n"),
        ("srun", 0, 2, "run.restarts=2 is ignored: starting ranks again is left to srun\n"),
        ("torchrun", 1, 2, ""),
        ("torchrun", 0, 0, ""),
    ],
)
def test_another_launcher_starts_its_ranks_again_itself(
    launcher: str, rank: int, restarts: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    warn_of_restarts(restarts, RankEnvironment(launcher, rank, 2, rank, 2, "localhost", 29500))
    assert capsys.readouterr().err == said
