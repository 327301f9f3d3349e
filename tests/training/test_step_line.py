"""The live line of a run, on a real terminal of any width."""

from __future__ import annotations

import fcntl
import itertools
import os
import pty
import re
import struct
import termios
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from rich.console import Console

from pipekit.training.step_line import LinePart, StepLine

ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
METRICS = [
    LinePart("loss 2.5000"),
    LinePart("lr 1.00e-03", 3),
    LinePart("12,346 tokens/s", 8),
    LinePart("MFU 42.8%", 9),
    LinePart("1.5 M tokens", 11),
    LinePart("28.4 GB", 10),
    LinePart("val loss 2.4000", 2),
    LinePart("waited for data: 11% of the step", 5),
]


@contextmanager
def terminal(width: int) -> Iterator[tuple[Console, int]]:
    """A console on a pseudo-terminal, and the end from which what it shows is read."""
    shown, own = pty.openpty()
    fcntl.ioctl(own, termios.TIOCSWINSZ, struct.pack("HHHH", 24, width, 0, 0))
    try:
        with os.fdopen(own, "w") as stream:
            yield Console(file=stream, width=os.get_terminal_size(own).columns, force_terminal=True), shown
    finally:
        os.close(shown)


@pytest.mark.parametrize("width", [40, 60, 80, 120])
def test_a_terminal_of_any_width_shows_one_line_with_step_loss_and_eta(width: int) -> None:
    line = StepLine("step", 0, 100_000)
    with terminal(width) as (console, shown):
        line.done, line.parts, line.remaining_s = 99_999, METRICS[:7], 3_700.0
        line.show(console)
        line.end()
        console.print("the end")
        # As a terminal draws it: a line that is as wide as the terminal would wrap, and leave its beginning above.
        drawn = b""
        while b"the end" not in drawn:
            drawn += os.read(shown, 65536)
    *frames, _ = [frame for frame in re.split(r"[\r\n]+", ESCAPES.sub("", drawn.decode())) if frame.strip()]
    assert all(len(frame) <= width for frame in frames)
    assert len({frame for frame in frames if "99999" in frame}) == 1
    for part in ("99999/100000", "loss 2.5000", "ETA 1:01:40"):
        assert part in frames[-1]
    assert ("━" in frames[-1]) == (width >= 100)
    assert not frames[-1].endswith("…")


def test_totals_and_rates_are_left_out_first_and_step_loss_and_eta_never_are() -> None:
    line = StepLine("step", 5, 10)
    line.parts, line.remaining_s = METRICS, 75
    texts = [part.text for part in METRICS]
    left = [{text for text in texts if text in line.fit(width)} for width in range(160, 20, -1)]
    assert all(later <= earlier for earlier, later in itertools.pairwise(left)), "narrower never shows more"
    order = [next(iter(gone)) for before, after in itertools.pairwise(left) if (gone := before - after)]
    assert order == [
        *("1.5 M tokens", "28.4 GB", "MFU 42.8%", "12,346 tokens/s"),
        *("waited for data: 11% of the step", "lr 1.00e-03", "val loss 2.4000"),
    ]
    assert line.fit(20) == "5/10 loss 2.5000 ETA 1:15"


def test_the_bar_is_drawn_where_the_terminal_is_wide_enough_alone() -> None:
    line = StepLine("step", 5, 10)
    line.parts, line.remaining_s = METRICS[:1], 75
    assert "━" in line.fit(100)
    assert "━" not in line.fit(99), "there is room for one, but the line of a narrower terminal stays short"
