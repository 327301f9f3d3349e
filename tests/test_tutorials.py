"""The tutorials, walked as a reader does: files written, commands run in their order, and outputs as shown."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest

from fork_server import run_pipekit, run_script
from test_docs import ROOT

PAGES = ("tutorial-first-model", "tutorial-own-text")
_NUMBER = re.compile(r"\d[\d,.:]*(?:e[+-]\d+)?")
_OF_A_BUSY_MACHINE = re.compile(r"waited for data: |warning: rank \d+ on host \S+ is slow: ")


def walk(page: Path, folder: Path) -> list[tuple[str, str]]:
    """Write the files of a page and run its commands in a folder; return the outputs shown and those that came."""
    outputs: list[tuple[str, str]] = []
    output = ""
    for language, text in re.findall(r"^```(\w+)\n(.*?)^```$", page.read_text(), flags=re.MULTILINE | re.DOTALL):
        if language == "text":
            outputs.append((text, output))
            continue
        if language in ("yaml", "python"):
            name = re.match(r"# (\S+)\n", text)
            assert name is not None, "the first line names the file"
            (folder / name[1]).write_text(text)
            continue
        assert language == "console"
        for line in text.splitlines():
            program, *arguments = shlex.split(line.removeprefix("$ "))
            if program == "python":
                done = run_script(folder / arguments[0], cwd=folder)
            else:
                for command, change in (("train eval", "data.cache_dir=cache"), ("train", "run.threads_per_process=1")):
                    arguments += [change] if arguments[0] in command.split() else []
                done = run_pipekit(arguments, cwd=folder)
            assert done.returncode == 0, f"{line}\n{done.stderr}"
            output = done.stdout
    return outputs


def unlike(shown: str, came: str) -> list[str]:
    """Return the first lines of a page, between lines of `...`, that did not come as they stand there, numbers aside.

    All of an output must be shown, but for what `...` stands for.
    """
    lines = [_words(line) for line in came.strip("\n").splitlines() if not _OF_A_BUSY_MACHINE.match(line)]
    pieces = [piece.splitlines() for piece in re.split(r"^\.\.\.$\n?", shown.strip("\n"), flags=re.MULTILINE)]
    place = 0
    for number, piece in enumerate(pieces, start=1):
        wanted = [_words(line) for line in piece]
        latest = len(lines) - len(wanted)
        starts = range(place if number < len(pieces) else max(place, latest), (latest if number > 1 else 0) + 1)
        found = [start for start in starts if lines[start : start + len(wanted)] == wanted]
        if not found:
            return piece
        place = found[0] + len(wanted)
    return []


def _words(line: str) -> list[str]:
    line = re.sub(r"  waited for data: \d+% of the step", "", line)
    return re.sub(r"\b[GT](?=FLOP/s)", "", _NUMBER.sub("0", line)).split()


@pytest.mark.parametrize(
    ("shown", "came", "expected"),
    [
        ("a  1.5 s\n...\nb 2\n", "a 2 s\nx\nb 33\n", []),
        ("a 1\nb 2\n", "\na 3\nb 4\n", []),
        ("...\nb 2\n...\n", "a 1\nb 2\nc 3\n", []),
        ("a 1\n...\n", "a 1\n", []),
        ("b 2\na 1\n", "a 1\nb 2\n", ["b 2", "a 1"]),
        # Columns and lines that are new are missed.
        ("a 1\nc 3\n", "a 1\nb 2\nc 3\n", ["a 1", "c 3"]),
        ("a 1\n", "a 1\nb 2\n", ["a 1"]),
        ("...\nb 2\n", "a 1\nb 2\nc 3\n", ["b 2"]),
        ("a 1\n...\nb 2 s\n", "a 1\nb 2 s  3 MB\n", ["b 2 s"]),
        ("a 1 MB\n", "a 1 GB\n", ["a 1 MB"]),
        ("a 1\n...\na 1\n", "a 1\n", ["a 1"]),
        # The machine's speed makes no difference.
        ("9 tokens/s  1.5 TFLOP/s  ETA 2", "8 tokens/s  90 GFLOP/s  waited for data: 4% of the step  ETA 5", []),
        ("a 1\nb 2", "a 1\nwaited for data: 9% of the steps; more\nwarning: rank 1 on host a is slow: 2 s\nb 3", []),
    ],
)
def test_lines_that_do_not_come_are_found(shown: str, came: str, expected: list[str]) -> None:
    assert unlike(shown, came) == expected


@pytest.mark.slow
@pytest.mark.distributed
def test_the_tutorials_can_be_followed(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    for name in PAGES:
        outputs = walk(ROOT / "docs" / f"{name}.md", tmp_path)
        assert len(outputs) >= 3
        for shown, came in outputs:
            assert unlike(shown, came) == [], came
    losses = {
        run: [
            record["val_loss"]
            for line in (tmp_path / f"runs/{run}/metrics.jsonl").read_text().splitlines()
            if "val_loss" in (record := json.loads(line))
        ]
        for run in ("first", "own", "lora")
    }
    assert losses["first"][-1] < losses["first"][0] - 1
    # Both ways of going on begin with the model that was exported.
    assert losses["own"][0] == pytest.approx(losses["lora"][0], abs=1e-6)
    assert losses["own"][-1] < losses["own"][0] - 0.3
    assert losses["lora"][-1] < losses["lora"][0] - 0.08
    whole, merged = (AutoModelForCausalLM.from_pretrained(tmp_path / f"exported/{name}") for name in ("own", "merged"))
    assert type(whole).__name__ == type(merged).__name__ == "LlamaForCausalLM"
