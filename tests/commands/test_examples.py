"""`pipekit examples`: what comes with the package, and copies of it."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from pipekit.cli import app
from pipekit.config import load_config
from pipekit.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]


def test_every_example_is_listed_with_what_it_is_about() -> None:
    output = CliRunner().invoke(app, ["examples"]).output
    lines = [line for line in output.splitlines() if not line.startswith(" ")]  # what goes on does so further in
    own = {path.name for path in (ROOT / "examples").iterdir() if path.suffix in (".yaml", ".py")} - {"__init__.py"}
    assert {line.split()[0] for line in lines} == own
    assert "gpt_stdlib.yaml      Trains a small GPT, cut into two pipeline stages, on the source" in output
    assert not any(line.endswith((".", ":", '"')) for line in output.splitlines())


def test_an_example_is_written_and_nothing_is_overwritten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert CliRunner().invoke(app, ["examples", "gpt_stdlib.yaml"]).output == "wrote gpt_stdlib.yaml\n"
    assert load_config(tmp_path / "gpt_stdlib.yaml") == load_config(ROOT / "examples/gpt_stdlib.yaml")
    again = CliRunner().invoke(app, ["examples", "gpt_stdlib.yaml"])
    assert isinstance(again.exception, ConfigError)
    assert "already exists; remove it, or give another name with -o" in str(again.exception)
    assert CliRunner().invoke(app, ["examples", "gpt_stdlib.yaml", "-o", "own.yaml"]).output == "wrote own.yaml\n"


@pytest.mark.parametrize(
    ("name", "rule"), [("gpt_stdli", "did you mean gpt_stdlib.yaml?"), ("../setup.cfg", "pipekit examples lists them")]
)
def test_an_unknown_example_is_refused(name: str, rule: str) -> None:
    found = CliRunner().invoke(app, ["examples", name])
    assert isinstance(found.exception, ConfigError)
    assert str(found.exception) == f"{name}: no such example; {rule}"
