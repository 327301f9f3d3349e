"""The commands that the command line finds."""

from __future__ import annotations

import pkgutil
from importlib import import_module
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from pipekit import cli, commands

NAMES = [
    "init",
    "data",
    "plan",
    "train",
    "verify",
    "import",
    "export",
    "generate",
    "eval",
    "checkpoints",
    "launch",
    "slurm",
    "doctor",
    "completion",
    "examples",
    "migrate",
    "presets",
    "report",
    "schedule",
    "schema",
    "tune",
]


def test_every_file_without_an_underscore_is_a_command() -> None:
    found = {module.name for module in pkgutil.iter_modules(commands.__path__) if "_" not in module.name}
    assert found == set(NAMES)
    assert list(typer.main.get_command(cli.app).commands) == NAMES  # type: ignore[attr-defined]
    for name in NAMES:
        assert import_module(f"pipekit.commands.{name}").command.__doc__


GREET = """
import typer

def command(name: str) -> None:
    "Greet somebody."
    typer.echo(f"hello {name}")
"""


def test_a_new_command_is_one_new_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "greet.py").write_text(GREET)
    (tmp_path / "greet_words.py").write_text("raise AssertionError")
    monkeypatch.setattr(commands, "__path__", [*commands.__path__, str(tmp_path)])
    monkeypatch.setattr(cli, "app", typer.Typer())
    cli._add_commands()
    runner = CliRunner()
    assert runner.invoke(cli.app, ["greet", "Ada"]).output == "hello Ada\n"
    assert "Greet somebody." in runner.invoke(cli.app, ["--help"]).output
