"""`pipekit report`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from html_pages import Page
from pipekit.cli import app
from pipekit.errors import ConfigError
from pipekit.run_lock import hold_run


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    monkeypatch.chdir(tmp_path)
    for name, loss in (("a", 2.5), ("b", 1.5)):
        folder = tmp_path / "runs" / name
        folder.mkdir(parents=True)
        (folder / "config.yaml").write_text("train: {steps: 1}\n")
        (folder / "metrics.jsonl").write_text(json.dumps({"step": 1, "loss": loss, "val_loss": loss + 1}) + "\n")
    return [Path("runs/a"), Path("runs/b")]


def report(*arguments: object) -> str:
    result = CliRunner().invoke(app, ["report", *map(str, arguments)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.output


def test_one_run_gets_a_page_in_its_folder(runs: list[Path]) -> None:
    assert report(runs[0]) == ("runs/a: finished, step 1 of 1, loss 2.5, val_loss 3.5\nwrote runs/a/report.html\n")
    assert "2.5" in Page((runs[0] / "report.html").read_text()).texts


def test_several_runs_get_a_page_here_or_where_one_wants_it(runs: list[Path]) -> None:
    assert report(*runs).splitlines()[1:] == [
        "runs/b: finished, step 1 of 1, loss 1.5, val_loss 2.5",
        "wrote report.html",
    ]
    assert {"2.5", "1.5"} <= set(Page(Path("report.html").read_text()).texts)
    assert not (runs[0] / "report.html").exists()
    assert report(*runs, "--html", "both.html").splitlines()[-1] == "wrote both.html"
    assert Path("both.html").exists()


def test_the_transcript_of_the_docs_is_true(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name, step, loss, val_loss in (("gpt_stdlib", 500, 4.6164, 4.5737), ("wide", 120, 4.9021, 4.8169)):
        folder = Path("runs") / name
        folder.mkdir(parents=True)
        (folder / "config.yaml").write_text("train: {steps: 500}\n")
        (folder / "metrics.jsonl").write_text(json.dumps({"step": step, "loss": loss, "val_loss": val_loss}) + "\n")
    page = (Path(__file__).parents[2] / "docs/report.md").read_text(encoding="utf-8")
    transcript = page.split("```console\n")[1].split("```")[0]
    shown = ""
    with hold_run("runs/wide"):
        for line in transcript.splitlines():
            if line.startswith("$ pipekit report "):
                shown += f"{line}\n{report(*line.split()[3:])}"
    assert shown == transcript


def test_mistakes_are_one_clear_error(runs: list[Path]) -> None:
    with pytest.raises(ConfigError, match=r"runs/c is no folder; give the folder of a run"):
        report(runs[0], "runs/c")
    with pytest.raises(ConfigError, match=r"runs/\.\./runs/a is given twice"):
        report(runs[0], "runs/../runs/a")
    assert not Path("report.html").exists()
