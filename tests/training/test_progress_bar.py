from __future__ import annotations

import io

from rich.console import Console

from pipekit.training.progress_bar import ProgressBar


def show(*, is_terminal: bool) -> str:
    stream = io.StringIO()
    with ProgressBar(Console(file=stream, force_terminal=is_terminal, width=80, color_system=None)) as report:
        report("training the tokenizer", None)
        report("encoding the text", 0.0)
        report("encoding the text", 0.5)
        report("encoding the text", 1.0)
        report("counting", None)
    return stream.getvalue()


def test_without_a_terminal_each_message_is_one_line() -> None:
    assert show(is_terminal=False) == "training the tokenizer ...\nencoding the text ...\ncounting ...\n"


def test_on_a_terminal_a_known_fraction_is_a_bar_that_stays_at_its_end() -> None:
    lines = show(is_terminal=True).splitlines()
    assert lines[0] == "training the tokenizer ..."
    bars = [line for line in lines if "encoding the text" in line]
    assert "100%" in bars[-1]
    assert "\u2501" * 24 in bars[-1]
    assert lines[-1].endswith("counting ...")
