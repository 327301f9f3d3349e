"""Tables as files."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given

from pipekit.errors import ScheduleError
from pipekit.schedules import Schedule, read_csv, write_csv
from schedules.tables import schedules


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tables")


@given(schedules)
def test_a_written_table_is_read_back(folder: Path, schedule: Schedule) -> None:
    path = folder / "table.csv"
    write_csv(schedule, path)
    read = read_csv(path)
    assert read.ranks == schedule.ranks
    assert read.num_micro_batches == schedule.num_micro_batches


def test_blanks_and_comments_do_not_count(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text('\ufeff#,"mine\n0F0, ,0F1,,0B0,0B1\n\n, 1F0,1B0,1F1,1B1\n,,\n', encoding="utf-8")
    assert str(read_csv(path)) == "0F0 0F1 0B0 0B1\n1F0 1B0 1F1 1B1"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("0F0,0B0\n1F0,1X0\n", "t.csv:2: column 2: '1X0' is not an action"),
        ("# nothing\n", "holds no action"),
        ("0F0,0F1,0B0,0B1\n1F0,1B0,1B1,1F1\n", ">1B1<"),
    ],
)
def test_a_wrong_table_says_where(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "t.csv"
    path.write_text(text)
    with pytest.raises(ScheduleError) as caught:
        read_csv(path)
    assert says in str(caught.value)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(ScheduleError, match=r"none\.csv: cannot be read as a schedule: No such file"):
        read_csv(tmp_path / "none.csv")
    (tmp_path / "binary.csv").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ScheduleError, match="cannot be read as a schedule"):
        read_csv(tmp_path / "binary.csv")
