"""Live line of a run on a terminal, which fits any width: step, loss and ETA stay, the rest where there is room."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import NamedTuple

from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.text import Text

_GAP = "  "
# A bar is drawn on terminals of this width and more, as long as there is room, and at most of so many columns.
_BAR_WIDTH, _BAR_COLUMNS = 100, 24


class LinePart(NamedTuple):
    """A part of the line, and how early it is left out where it does not fit; 0 is never left out."""

    text: str
    leave_out: int = 0


class StepLine:
    """Progress of a run on one line of a terminal: what is done, and what remains; a renderable of rich.

    Args:
        unit: what is counted, as "step".
        done, total: how many have been done, and are to be.
    """

    def __init__(self, unit: str, done: int, total: int) -> None:
        self.unit, self.done, self.total = unit, done, total
        self.parts: Sequence[LinePart] = ()
        self.remaining_s: float | None = None
        self._started_s = time.monotonic()
        self._live: Live | None = None

    def show(self, console: Console) -> None:
        """Keep the line below all that the console prints, until `end`."""
        self._live = Live(self, console=console)
        self._live.start()

    def end(self) -> None:
        """Leave the line as it is."""
        if self._live is not None:
            self._live.stop()

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield Text(self.fit(options.max_width), no_wrap=True, overflow="ellipsis")

    def fit(self, width: int) -> str:
        """The line in at most so many columns, if what is never left out fits.

        Example:
            >>> line = StepLine("step", 5, 10)
            >>> line.parts, line.remaining_s = [LinePart("loss 2.5000"), LinePart("9,000 tokens/s", 8)], 75
            >>> line.fit(60)
            'step 5/10  loss 2.5000  9,000 tokens/s  ETA 1:15  0:00'
            >>> line.fit(40)
            'step 5/10  loss 2.5000  ETA 1:15  0:00'
            >>> line.fit(30)
            '5/10 loss 2.5000 ETA 1:15'
        """
        count = f"{self.done}/{self.total}"
        remaining = "--:--" if self.remaining_s is None else show_time(self.remaining_s)
        parts = [LinePart(f"{self.unit} {count}"), *self.parts, LinePart(f"ETA {remaining}")]
        parts.append(LinePart(show_time(time.monotonic() - self._started_s), 7))
        while len(_join(parts)) > width:
            first = max(parts, key=lambda part: part.leave_out)
            if first.leave_out == 0:
                return " ".join([count, *(part.text for part in parts[1:])])
            parts.remove(first)
        length = min(_BAR_COLUMNS, width - len(_join(parts)) - len(_GAP))
        if width >= _BAR_WIDTH and length > 0:
            filled = length * min(self.done, self.total) // max(1, self.total)
            parts.insert(1, LinePart("━" * filled + "╌" * (length - filled)))
        return _join(parts)


def _join(parts: Sequence[LinePart]) -> str:
    return _GAP.join(part.text for part in parts)


def show_time(seconds: float) -> str:
    """Return a duration for people.

    Example:
        >>> show_time(75), show_time(3700)
        ('1:15', '1:01:40')
    """
    minutes, secs = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{secs:02d}" if hours else f"{minutes}:{secs:02d}"
