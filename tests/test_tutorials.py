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
    """Return the lines that a page shows and that did not come, in this order, numbers aside.

    A line that came may have more words, such as a wait for data on a busy machine.
    """
    lines = iter(_NUMBER.sub("0", line).split() for line in came.splitlines())

    def comes(line: str) -> bool:
        wanted = _NUMBER.sub("0", line).split()
        return any(bool(words) == bool(wanted) and _holds(words, wanted) for words in lines)

    return [line for line in shown.splitlines() if line != "..." and not comes(line)]


def _holds(words: list[str], wanted: list[str]) -> bool:
    rest = iter(words)
    return all(word in rest for word in wanted)


def test_lines_that_do_not_come_are_found() -> None:
    assert unlike("a  1.5 s\n...\nb 2\n", "a 2 s\nx\nb 33\n") == []
    assert unlike("b 2\na 1\n", "a 1\nb 2\n") == ["a 1"]
    assert unlike("c 1\n", "a 1\n") == ["c 1"]
    assert unlike("loss 1  ETA 2\n", "loss 3  waited for data: 4 %  ETA 5\n") == []


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
