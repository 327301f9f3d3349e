"""Records of runs, read from their folders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pipekit.errors import ConfigError
from pipekit.pages.run_record import RunRecord
from pipekit.run_lock import hold_run


def write_lines(path: Path, *records: dict[str, Any]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "wide"
    folder.mkdir()
    (folder / "config.yaml").write_text("train: {steps: 3}\n")
    return folder


def event(second: int, step: int, kind: str, text: str = "") -> dict[str, Any]:
    return {"time": f"2026-11-27T08:00:{second:02d}+00:00", "step": step, "event": kind, "text": text}


@pytest.mark.parametrize(
    ("last", "step", "state"),
    [
        ([], 0, "interrupted"),
        ([event(0, 0, "start")], 1, "interrupted"),
        ([event(0, 0, "start"), event(1, 1, "stop")], 1, "stopped"),
        ([event(0, 0, "start"), event(1, 2, "end")], 2, "finished"),
        ([event(0, 0, "start")], 3, "finished"),
    ],
)
def test_states(run: Path, last: list[dict[str, Any]], step: int, state: str) -> None:
    write_lines(run / "events.jsonl", *last)
    write_lines(run / "metrics.jsonl", *({"step": each, "loss": 2.0} for each in range(1, step + 1)))
    assert RunRecord.read(run).state == state


def test_a_run_whose_folder_is_held_goes_on_until_it_says_that_it_stops(run: Path) -> None:
    write_lines(run / "events.jsonl", event(0, 0, "start"))
    with hold_run(run):
        assert RunRecord.read(run).state == "going on"
        write_lines(run / "events.jsonl", event(0, 0, "start"), event(1, 2, "stop"))
        assert RunRecord.read(run).state == "stopped"


@pytest.mark.parametrize(
    ("then", "held", "free"), [("the end", "failed", "failed"), ("restart 1 of 2", "going on", "failed")]
)
def test_a_failure_is_the_end_unless_the_run_is_started_again(run: Path, then: str, held: str, free: str) -> None:
    failure = {"time": "2026-11-27T08:00:05+00:00", "kind": "rank_lost", "message": "rank 1 died", "then": then}
    write_lines(run / "events.jsonl", event(0, 0, "start"))
    write_lines(run / "failures.jsonl", failure)
    with hold_run(run):
        assert RunRecord.read(run).state == held
    assert RunRecord.read(run).state == free


def test_events_of_all_files_stand_in_the_order_of_time(run: Path) -> None:
    spike = {"step": 2, "loss": 9.0, "score": 41.0, "first_sample": 0, "end": 8}
    write_lines(run / "events.jsonl", event(0, 0, "start"), event(9, 3, "end"))
    write_lines(run / "spikes.jsonl", spike)
    failure = {
        "time": "2026-11-27T08:00:05+00:00",
        "kind": "rank_lost",
        "rank": 1,
        "host": "a",
        "message": "rank 1 died",
    }
    write_lines(run / "failures.jsonl", {**failure, "then": "restart 1 of 2, from step-00000002"})
    (run / "logs").mkdir()
    write_lines(run / "logs/stalls.jsonl", {"time": "2026-11-27T08:00:04+00:00", "text": "step 2 has lasted 9 s"})
    record = RunRecord.read(run)
    assert [each.kind for each in record.events] == ["start", "stall", "restart", "spike", "end"]
    assert record.events[1].text == "step 2 has lasted 9 s"
    assert record.events[2].text == "rank_lost rank 1 on a: rank 1 died; then restart 1 of 2, from step-00000002"
    assert record.spikes == [(2, 9.0)]
    write_lines(run / "events.jsonl", event(0, 0, "start"), event(1, 2, "warning", "step 2: the loss of 9 is a spike"))
    assert "spike" not in [each.kind for each in RunRecord.read(run).events], "it is told once"


def test_records_that_are_cut_short_or_foreign_are_passed_over(run: Path) -> None:
    (run / "events.jsonl").write_text('{"step": 1}\n[1]\nno json\n{"event": "start", "ti')
    (run / "plan.json").write_text("[]")
    (run / "config.yaml").write_text("{")
    (run / "profile").mkdir()
    (run / "profile/step-00000013.json").write_text("{}")
    record = RunRecord.read(run)
    assert (record.events, record.plan, record.config, record.timelines) == ([], {}, {}, None)
    assert record.config_text == "{"


def test_a_folder_that_is_no_run_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere is no folder; give the folder of a run, which has a config.yaml"):
        RunRecord.read(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="holds no run"):
        RunRecord.read(tmp_path)
