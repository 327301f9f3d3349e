"""`pipekit schedule`: what one sees of a schedule before a run."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from pipekit.cli import app
from pipekit.commands.schedule import command
from pipekit.errors import ConfigError
from pipekit.schedules import read_csv


def test_the_command_draws_a_step_and_says_what_it_holds() -> None:
    done = CliRunner().invoke(app, ["schedule", "zb-h1", "--pp", "2", "--micro-batches", "4", "--costs", "10,10,10"])
    assert done.exit_code == 0, done.output
    *rows, legend, memory = done.output.strip().split("\n")
    assert [row[:7] for row in rows] == ["rank 0 ", "rank 1 "]
    assert legend.endswith("step 130 ms, bubble 7.69 %")
    assert memory == "in flight at most, rank by rank: 2, 2 (micro-batches)"


def test_table_and_picture_are_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table, picture = tmp_path / "t.csv", tmp_path / "p.svg"
    command("zb-v", pp=2, micro_batches=4, transfer=1.0, csv=table, picture=picture)
    assert "micro-batches of one stage, of 2 on each rank" in capsys.readouterr().out
    assert read_csv(table).placement == (0, 1, 1, 0)
    assert picture.read_text().startswith("<?xml")
    command(str(table), pp=2, micro_batches=4)
    assert capsys.readouterr().out.startswith("rank 0 F0")


@pytest.mark.parametrize("costs", ["10", "a,b,c", "1,2,3,4", ""])
def test_costs_are_three_numbers(costs: str) -> None:
    with pytest.raises(ConfigError, match="must be three numbers"):
        command("1f1b", pp=2, micro_batches=4, costs=costs)
