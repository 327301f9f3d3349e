"""Heartbeats that are written by hand: the warnings that they cause, and the ranks that reports name."""

from __future__ import annotations

import io
import json
import time
from dataclasses import asdict, replace
from datetime import datetime, timedelta
from pathlib import Path

import pytest

from pipekit.hangs import monitor as monitor_module
from pipekit.hangs.activity import Activity
from pipekit.hangs.heartbeat import Heartbeat, HeartbeatThread, heartbeat_file
from pipekit.hangs.monitor import HangMonitor, HangReporter
from pipekit.schedules.action import Action
from pipekit.schedules.operations import Operation


class Ranks:
    """A pipeline of four ranks in step 7, whose usual steps take a second, and their monitor."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.now_s = 1000.0
        self.beats = {
            rank: Heartbeat(rank, (rank,), phase="step 7", doing=f"computing {rank}F2", usual_step_s=1.0)
            for rank in range(4)
        }
        self.silent: set[int] = set()
        self.monitor = HangMonitor(folder, range(4), clock=lambda: self.now_s)
        self.pass_s(0.0)

    def change(self, rank: int, **changes: object) -> None:
        self.beats[rank] = replace(self.beats[rank], **changes)  # type: ignore[arg-type]

    def wait(self, rank: int, *others: int) -> None:
        self.change(rank, doing="receiving the output of 1F2", is_waiting=True, waits_for=others)

    def write(self, rank: int) -> None:
        heartbeat_file(self.folder, rank).write_text(json.dumps(asdict(self.beats[rank])))

    def pass_s(self, seconds: float) -> list[str]:
        """Let time pass; return the warnings."""
        warnings = []
        for _ in range(max(1, int(2 * seconds))):
            step_s = 0.5 if seconds else 0.0
            self.now_s += step_s
            for rank, beat in self.beats.items():
                if rank not in self.silent:
                    phase_s, doing_s = beat.phase_s + step_s, beat.doing_s + step_s
                    self.change(rank, number=beat.number + 1, phase_s=phase_s, doing_s=doing_s)
                    self.write(rank)
            self.monitor.listen()
            warnings += [text for text in [self.monitor.warning()] if text]
        return warnings


@pytest.fixture
def ranks(tmp_path: Path) -> Ranks:
    return Ranks(tmp_path)


def test_a_stopped_rank_is_named_with_its_last_operation_and_those_that_wait_for_it(ranks: Ranks) -> None:
    ranks.silent = {2}
    for rank, other in ((0, 1), (1, 2), (3, 2)):
        ranks.wait(rank, other)
    assert ranks.pass_s(9.5) == []
    assert ranks.pass_s(50) == [
        "step 7 has lasted 10 s (10 usual steps take 10 s): rank 2 (stage 2) has not been heard from for 10 s, and was "
        "last seen in step 7, computing 2F2; rank 1 and rank 3 wait for it"
    ]
    assert ranks.monitor.longest_silence_s() == 59.5
    assert ranks.monitor.report().splitlines() == [
        "the run hangs: rank 2 (stage 2) has not been heard from for 60 s, and was last seen in step 7, computing "
        "2F2; rank 1 and rank 3 wait for it",
        "",
        "rank  stage  phase   doing                        waits for  for",
        "0     0      step 7  receiving the output of 1F2  1          60 s",
        "1     1      step 7  receiving the output of 1F2  2          60 s",
        "2     2      step 7  computing 2F2                (silent)   60 s",
        "3     3      step 7  receiving the output of 1F2  2          60 s",
    ]


def test_a_slow_rank_waits_for_nobody(ranks: Ranks) -> None:
    ranks.wait(0)
    ranks.wait(1, 2)
    ranks.wait(3, 2)
    (warning,) = ranks.pass_s(30)
    assert "rank 2 (stage 2) waits for nobody, and has been computing 2F2 for 10 s" in warning
    # The ranks that gave up are no longer there, and nothing is to be read into their silence.
    assert ranks.monitor.report({0, 1, 3}).startswith("the run hangs: rank 2 (stage 2) waits for nobody")


def test_ranks_that_wait_for_each_other(ranks: Ranks) -> None:
    for rank in range(4):
        ranks.wait(rank, rank ^ 1)
    assert ranks.pass_s(30)[0].endswith("every rank waits for another")


def test_there_is_one_warning_about_each_stall(ranks: Ranks) -> None:
    assert len(ranks.pass_s(30)) == 1
    for rank in range(4):
        ranks.change(rank, phase="step 8", phase_s=0.0)
    assert ranks.pass_s(5) == []
    assert len(ranks.pass_s(10)) == 1


def test_warnings_of_all_launchers_are_kept_in_whole_lines(ranks: Ranks) -> None:
    other = HangMonitor(ranks.folder, range(4), clock=lambda: ranks.now_s)
    terminals = [io.StringIO(), io.StringIO()]
    for phase_s in (0.0, 99.0, 0.0, 99.0):
        ranks.now_s += 1
        for rank, beat in ranks.beats.items():
            ranks.change(rank, number=beat.number + 1, phase_s=phase_s)
            ranks.write(rank)
        for monitor, terminal in zip((ranks.monitor, other), terminals, strict=True):
            monitor.listen()
            monitor.warn(terminal)
            monitor.warn(terminal)
    lines = (ranks.folder / "stalls.jsonl").read_text().splitlines()
    stalls = [json.loads(line) for line in lines]
    assert len(stalls) == 4
    said = [f"warning: {stall['text']}\n" for stall in stalls]
    assert ["".join(said[0::2]), "".join(said[1::2])] == [terminal.getvalue() for terminal in terminals]
    assert datetime.fromisoformat(stalls[0]["time"]).utcoffset() == timedelta(0)


def test_a_warning_that_cannot_be_kept_is_still_given(ranks: Ranks) -> None:
    (ranks.folder / "stalls.jsonl").mkdir()
    ranks.silent = {1}
    ranks.now_s += 60
    ranks.monitor.listen()
    terminal = io.StringIO()
    ranks.monitor.warn(terminal)
    assert terminal.getvalue().startswith("warning: step 7 has lasted 60 s")


@pytest.mark.parametrize(
    ("phase", "usual_step_s", "warns"),
    [
        ("step 7", 1.0, True),
        ("step 7", 100.0, False),
        ("step 1", None, False),  # it compiles, and nobody knows how long a step takes
        ("evaluation after step 6", 1.0, False),  # many short operations
        ("checkpoint step-00000006", 1.0, False),
        ("callbacks after step 6", 1.0, False),
    ],
)
def test_only_what_has_a_usual_time_can_last_too_long(
    ranks: Ranks, phase: str, usual_step_s: float | None, warns: bool
) -> None:
    for rank in range(4):
        ranks.change(rank, phase=phase, usual_step_s=usual_step_s)
    warnings = []
    for _ in range(60):
        if not phase.startswith("step"):
            for rank in range(4):
                ranks.change(rank, doing_s=0.0)
        warnings += ranks.pass_s(0.5)
    assert bool(warnings) == warns


@pytest.mark.parametrize("phase", ["start", "step 1", "evaluation after step 6", "checkpoint step-00000006"])
def test_a_silent_rank_causes_a_warning_in_every_phase(ranks: Ranks, phase: str) -> None:
    for rank in range(4):
        ranks.change(rank, phase=phase, usual_step_s=None)
    ranks.silent = {1}
    assert "rank 1 (stage 1) has not been heard from for 10 s" in ranks.pass_s(30)[0]


def test_a_rank_that_has_ended_as_it_should_is_not_missed(ranks: Ranks) -> None:
    ranks.silent = {3}
    heartbeat_file(ranks.folder, 3).unlink()
    assert not any("rank 3" in text for text in ranks.pass_s(30))
    assert ranks.monitor.longest_silence_s() == 0.0


def test_a_heartbeat_tells_phase_and_operation_and_its_file_goes(tmp_path: Path) -> None:
    activity = Activity()
    path = heartbeat_file(tmp_path, 1)

    def beat_after(number: int) -> Heartbeat:
        deadline_s = time.monotonic() + 60
        while (beat := Heartbeat.read(path)) is None or beat.number <= number:
            assert time.monotonic() < deadline_s, "no heartbeat comes"
            time.sleep(0.01)
        return beat

    with HeartbeatThread(activity, tmp_path, rank=1, world_size=4, stages=(2, 3), pipe_ranks=(0, 1, 2, 3)):
        first = beat_after(0)
        assert (first.rank, first.stages, first.phase, first.doing) == (1, (2, 3), "start", "building the engine")
        activity.begin_step(12)
        activity.note(Operation("receive", Action(1, "F", 3), 1))
        # The next beat may have been under way.
        second = beat_after(first.number + 1)
    assert (second.phase, second.doing, second.is_waiting) == ("step 12", "receiving the output of 1F3", False)
    assert not path.exists()


def test_the_usual_step_is_a_median_without_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0, 0, 0.0, 100.0, 101.0, 103.0, 150.0, 153.0, 200.0])
    monkeypatch.setattr("pipekit.hangs.activity.time.monotonic", lambda: next(clock))
    activity = Activity()
    usual = []
    for step in range(1, 6):
        activity.begin_step(step)  # the steps last 100, 1, 2 and 47 s
        usual.append(activity.usual_step_s)
    assert usual == [None, None, None, None, 2.0]


def test_without_a_launcher_the_lowest_rank_that_is_heard_from_reports(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ranks = Ranks(tmp_path)
    monkeypatch.setattr(
        monitor_module, "HangMonitor", lambda folder, of: HangMonitor(folder, of, clock=lambda: ranks.now_s)
    )
    terminals = [io.StringIO() for _ in range(4)]
    reporters = [HangReporter(tmp_path, 4, 60.0, terminal) for terminal in terminals]
    ranks.silent = {0}
    for rank in (1, 2, 3):
        ranks.wait(rank, 0)
    for _ in range(140):
        ranks.pass_s(0.5)
        for rank in (1, 2, 3):
            reporters[rank](ranks.beats[rank])
    text = terminals[1].getvalue()
    assert text.count("warning: step 7 has lasted") == 1
    assert text.count("the run hangs: rank 0 (stage 0) has not been heard from") == 1
    assert "the run hangs: rank 0" in (tmp_path / "hang.txt").read_text()
    (stall,) = (tmp_path / "stalls.jsonl").read_text().splitlines()
    assert f"warning: {json.loads(stall)['text']}\n" in text
    assert not any(terminals[rank].getvalue() for rank in (0, 2, 3))
