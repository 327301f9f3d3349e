"""`pipekit schedule`: what one sees of a schedule before a run."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

from pipekit.cli import app
from pipekit.commands.schedule import command
from pipekit.errors import ConfigError
from pipekit.schedules import read_csv

ROOT = Path(__file__).resolve().parents[2]


def test_the_command_draws_a_step_and_says_what_it_holds() -> None:
    done = CliRunner().invoke(app, ["schedule", "zb-h1", "--pp", "2", "--micro-batches", "4", "--costs", "10,10,10"])
    assert done.exit_code == 0, done.output
    *rows, legend, memory = done.output.strip().split("\n")
    assert [row[:7] for row in rows] == ["rank 0 ", "rank 1 "]
    assert legend.endswith("step 130 ms, bubble 7.69 %")
    assert memory == "in flight at most, rank by rank: 2, 2 (micro-batches)"


def test_table_and_picture_are_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table, picture = tmp_path / "t.csv", tmp_path / "p.svg"
    command(["zb-v"], pp=2, micro_batches=4, transfer=1.0, csv=table, picture=picture)
    assert "micro-batches of one stage; each rank has 2" in capsys.readouterr().out
    assert read_csv(table).placement == (0, 1, 1, 0)
    assert picture.read_text().startswith("<?xml")
    command([str(table)], pp=2, micro_batches=4)
    assert capsys.readouterr().out.startswith("rank 0 F0")


@pytest.mark.parametrize("costs", ["10", "a,b,c", "1,2,3,4", ""])
def test_costs_are_three_numbers(costs: str) -> None:
    with pytest.raises(ConfigError, match="must be three numbers"):
        command(["1f1b"], pp=2, micro_batches=4, costs=costs)


def test_several_schedules_are_shown_one_after_the_other_and_drawn_into_one_picture(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command(["1f1b", "zb-v"], pp=2, micro_batches=2, picture=tmp_path / "both.svg")
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if " " not in line] == ["1f1b", "zb-v"]
    assert boxes(tmp_path / "both.svg").keys() == {"1f1b", "zb-v"}
    with pytest.raises(ConfigError, match=r"t.csv holds one schedule, but 2 are given"):
        command(["1f1b", "zb-v"], csv=tmp_path / "t.csv")


def boxes(picture: Path) -> dict[str, list[tuple[float, ...]]]:
    """Return the boxes of each timeline of a picture, in fractions of its width, with their colours."""
    found: dict[str, list[tuple[float, ...]]] = {}
    for axes in re.split(r'<g id="axes_\d+">', picture.read_text())[1:]:
        (title,) = re.findall(r"<!-- (\S+): step", axes)
        drawn = [
            (int(colour, 16), *(tuple(map(float, point.split())) for point in re.findall(r"[ML] (\S+ \S+) ", path)))
            for path, colour in re.findall(r'<path d="([^"]+)"[^>]*style="fill: #(\w{6}); stroke: #ffffff', axes)
        ]
        left = min(corner[0] for _, *corners in drawn for corner in corners)
        right = max(corner[0] for _, *corners in drawn for corner in corners)
        found[title] = sorted(
            (colour, *(round((side - left) / (right - left), 3) for side in (corners[0][0], corners[2][0])))
            for colour, *corners in drawn
        )
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", ["schedules", "pipeline"])
def test_the_pictures_of_the_docs_are_those_that_the_command_draws(name: str, tmp_path: Path) -> None:
    picture = f"docs/{name}.svg"
    pages = [page.read_text() for page in (ROOT / "docs").glob("*.md")]
    (line,) = {line for page in pages for line in page.splitlines() if line.endswith(f"--picture {picture}")}
    program, *arguments = shlex.split(line)
    drawn = tmp_path / "drawn.svg"
    assert program == "pipekit"
    assert CliRunner().invoke(app, [*arguments[:-1], str(drawn)]).exit_code == 0
    assert boxes(drawn) == boxes(ROOT / picture)
