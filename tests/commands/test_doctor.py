"""`pipekit doctor`: a whole examination, and how it is shown."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fork_server import run_pipekit
from pipekit.cli import app
from pipekit.commands.doctor import row_lines, summary_line
from pipekit.doctor import checks
from pipekit.doctor.examine import find_families
from pipekit.doctor.rows import Row

TIDE = """
from pipekit.doctor.rows import Row

def check_tide(site):
    return [Row("tide", "{verdict}", "high", "Run." if "{verdict}" != "ok" else "")]
"""


@pytest.mark.distributed
def test_a_whole_examination(tmp_path: Path) -> None:
    done = run_pipekit(["doctor", "--json", "--cache-dir", "cache"], cwd=tmp_path, environ={"CUDA_VISIBLE_DEVICES": ""})
    rows = json.loads(done.stdout)["rows"]
    assert {row["family"] for row in rows} == set(find_families())
    assert done.returncode == int(any(row["verdict"] == "bad" for row in rows)), done.stderr
    by_check = {row["check"]: row for row in rows}
    assert by_check["torch"]["verdict"] != "bad"
    assert not [row for row in rows if row["found"].startswith("could not be checked")]
    speed = by_check["gloo: all-reduce"]["measured"]
    assert speed["is_right"]
    assert len(speed["hosts"]) == speed["world_size"] >= 2
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("verdict", "exit_code"), [("ok", 0), ("warning", 0), ("bad", 1)])
def test_the_exit_code_says_whether_something_is_bad(
    verdict: str, exit_code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sea.py").write_text(TIDE.format(verdict=verdict))
    monkeypatch.setattr(checks, "__path__", [str(tmp_path)])
    monkeypatch.delitem(__import__("sys").modules, "pipekit.doctor.checks.sea", raising=False)
    done = CliRunner().invoke(app, ["doctor"])
    assert done.exit_code == exit_code
    heading, row, *_, summary = done.output.splitlines()
    assert heading == "sea"
    assert row == f"  {verdict:<8} tide                 high"
    assert summary == summary_line([Row("tide", verdict, "high")])  # type: ignore[arg-type]


def test_options_about_hosts_need_a_hostfile() -> None:
    done = CliRunner().invoke(app, ["doctor", "--include", "worker-1"])
    assert str(done.exception) == "--include applies to the hosts of --hostfile; give that as well"


def test_rows_fit_into_80_columns_and_move_no_cursor() -> None:
    row = Row("shared memory", "warning", "64 MiB of /dev/shm \x1b[2J are free " * 4, "Start the container anew. " * 5)
    lines = row_lines(row)
    assert max(map(len, lines)) <= 80
    assert "\x1b" not in "".join(lines)
    assert lines[0].startswith("  warning  shared memory        64 MiB of")
    assert any(line.lstrip().startswith("-> Start the container") for line in lines)
    assert row_lines(Row("4 ranks on 2 hosts: all-reduce", "ok", "fast")) == [
        "  ok       4 ranks on 2 hosts: all-reduce",
        " " * 32 + "fast",
    ]
    number = row_lines(Row("send", "ok", "1.2 GB/s, with some more words as a filler 16 MiB in 5 ms"))
    assert "16 MiB" in number[1]


def test_verdicts_are_counted() -> None:
    rows = [Row("a", "ok", ""), Row("b", "warning", ""), Row("c", "bad", ""), Row("d", "ok", "")]
    assert summary_line(rows) == "2 ok, 1 warning, 1 bad"
