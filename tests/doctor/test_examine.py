"""An examination finds its checks by itself, and a check that fails is a finding."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipekit.doctor import checks
from pipekit.doctor.checks import clock  # noqa: F401 - a new family imports from it
from pipekit.doctor.examine import examine, find_families
from pipekit.doctor.rows import Row, Site, existing_parent

SITE = Site(environ={}, run_dir=Path("runs"), cache_dir=Path("cache"))

NEW_FAMILY = """
from pipekit.doctor.checks.clock import check_clock
from pipekit.doctor.rows import Row

def check_tide(site):
    return [Row("tide", "warning", "low", "Wait.")]

def check_the_moon(site):
    raise ZeroDivisionError("no moon")
"""


def test_families_are_the_files_of_the_folder() -> None:
    files = {path.stem for path in Path(checks.__path__[0]).glob("*.py")} - {"__init__"}
    assert set(find_families()) == files
    assert find_families()[0] == "software"


def test_a_new_file_is_all_that_a_new_family_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "lake.py").write_text(NEW_FAMILY)
    monkeypatch.setattr(checks, "__path__", [str(tmp_path)])
    tide, moon = examine(SITE)
    assert tide == Row("tide", "warning", "low", "Wait.", family="lake")
    # What a file imports from another is not its own.
    assert (moon.check, moon.verdict) == ("the moon", "warning")
    assert moon.found == "could not be checked: ZeroDivisionError: no moon"


def test_rows_go_through_json_and_back() -> None:
    row = Row("tide", "bad", "high", "Run.", {"metres": 3}, family="sea")
    assert Row.from_record(row.to_record()) == row
    with pytest.raises(ValueError, match="not a row"):
        Row.from_record(row.to_record() | {"verdict": "fine"})
    with pytest.raises(TypeError):
        Row.from_record({"colour": "red"})


def test_a_folder_that_is_not_there_is_examined_by_the_one_above(tmp_path: Path) -> None:
    assert existing_parent(tmp_path / "runs" / "first") == tmp_path
    assert existing_parent(tmp_path) == tmp_path


def test_libraries_that_end_their_process_are_told_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.executable", "/bin/false")
    assert SITE.libraries == {"error": "importing torch and DeepSpeed crashes: exit code 1"}
    vars(SITE).pop("libraries")
