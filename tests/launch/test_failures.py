"""The rank that is blamed for a failure, and its message."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from pipekit.errors import ExitCode
from pipekit.launch.failures import (
    FailureKind,
    FailureReport,
    RankFailure,
    describe_failure,
    first_failure,
    tail_of_log,
)


def failed(
    rank: int, time_s: float, *, kind: FailureKind | None = None, returncode: int = 1, log: str = "none"
) -> RankFailure:
    """A rank that failed at `time_s`, and was seen to have ended a second later."""
    report = None if kind is None else FailureReport(kind, f"message of {rank}", "Traceback\nthe end", time_s, 3)
    return RankFailure(rank, returncode, time_s + 1, report, Path(log))


@pytest.mark.parametrize(
    ("failures", "blamed"),
    [
        pytest.param([failed(0, 2, kind="crash"), failed(1, 1, kind="user")], 1, id="the earliest"),
        pytest.param([failed(0, 1, kind="peer"), failed(1, 5, kind="crash")], 1, id="a peer's loss is no cause"),
        pytest.param([failed(0, 1, kind="peer"), failed(1, 5, returncode=-9)], 1, id="nor before a kill"),
        pytest.param([failed(0, 2, kind="peer"), failed(1, 1, kind="peer")], 1, id="the earliest of peers"),
        pytest.param([failed(0, 1, kind="user"), failed(1, 3, returncode=-6)], 0, id="an abort that followed"),
    ],
)
def test_first_failure(failures: list[RankFailure], blamed: int) -> None:
    assert first_failure(failures).rank == blamed
    assert first_failure(failures[::-1]).rank == blamed


def test_a_report_fits_into_the_room_that_is_kept_where_the_disk_is_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, content: str) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pipekit.launch.failures.write_atomically", full)
    path = tmp_path / "rank-0.error.json"
    FailureReport.keep_room(path)
    assert FailureReport.read(path) is None
    size = path.stat().st_size
    FailureReport("user", "the disk is full 😀", "\U0001f600" * 100_000, 1.0, 5).write(path)
    report = FailureReport.read(path)
    assert report is not None
    assert (report.message, report.exit_code) == ("the disk is full 😀", 5)
    assert path.stat().st_size == size


def test_a_users_error_is_shown_as_its_message_alone() -> None:
    assert describe_failure(failed(3, 0, kind="user")) == "rank 3: message of 3"


def test_a_crash_is_shown_with_its_traceback_and_log() -> None:
    message = describe_failure(failed(3, 0, kind="crash", log="logs/rank-3.log"))
    assert message.startswith("rank 3 failed: message of 3\nTraceback\nthe end\n")
    assert message.endswith("logs/rank-3.log")


def test_a_kill_is_shown_with_the_end_of_the_log(tmp_path: Path) -> None:
    log = tmp_path / "rank-1.log"
    log.write_text("earlier launch\n" + "".join(f"line {number}\n" for number in range(100)))
    failure = RankFailure(1, -9, 0, None, log, log_start=len("earlier launch\n"))
    message = describe_failure(failure)
    assert message.startswith("rank 1 was killed by SIGKILL; out of memory?\n")
    assert "line 80\n" in message
    assert "line 99\n" in message
    assert "line 79\n" not in message
    assert message.endswith(str(log))
    assert "SIGSEGV\n" in describe_failure(RankFailure(1, -11, 0, None, log))
    assert "exit code 3" in describe_failure(RankFailure(1, 3, 0, None, log))
    assert "signal 50" in describe_failure(RankFailure(1, -50, 0, None, log))


def test_a_rank_that_has_saved_on_request_has_stopped_even_if_it_is_killed_on_its_way_out() -> None:
    report = FailureReport("user", "stopped by SIGTERM after step 3", "", 0.0, ExitCode.STOPPED)
    ends = [(75, None), (75, report), (-9, report), (-9, None), (3, replace(report, exit_code=3))]
    assert [RankFailure(0, code, 0.0, each, Path("/none")).has_stopped for code, each in ends] == [True] * 3 + [
        False
    ] * 2


def test_the_tail_leaves_out_what_earlier_launches_wrote(tmp_path: Path) -> None:
    log = tmp_path / "rank-0.log"
    log.write_text("old\nnew\n")
    assert tail_of_log(log, start=4) == "new"
    assert tail_of_log(log, start=8) == ""
    assert tail_of_log(tmp_path / "missing") == ""


def test_a_report_is_read_as_it_was_written(tmp_path: Path) -> None:
    path = tmp_path / "rank-0.error.json"
    assert FailureReport.read(path) is None
    report = FailureReport("crash", "ValueError: schön", "Traceback", 12.5, 3)
    report.write(path)
    assert FailureReport.read(path) == report
    assert list(tmp_path.iterdir()) == [path]
    path.write_text("{half")
    assert FailureReport.read(path) is None
