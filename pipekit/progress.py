"""Progress of long work: the callback that is told, and lines of text that show it."""

from __future__ import annotations

import sys
from collections.abc import Callable

ProgressCallback = Callable[[str, float | None], None]
"""Called as `on_progress(message, fraction)` with what is being done, and the fraction done where it is known."""


class ProgressLines:
    """Writes one line for each new message.

    Args:
        write: takes a line without its end.

    Example:
        >>> lines = []
        >>> show = ProgressLines(lines.append)
        >>> show("reading", 0.0), show("reading", 0.5), show("counting", None)
        (None, None, None)
        >>> lines
        ['reading ...', 'counting ...']
    """

    def __init__(self, write: Callable[[str], object]) -> None:
        self._write = write
        self._last = ""

    @classmethod
    def on_stderr(cls) -> ProgressLines:
        """Lines beside the output of a command."""
        return cls(lambda line: sys.stderr.write(f"{line}\n"))

    def __call__(self, message: str, fraction: float | None = None) -> None:
        """Write the message, unless it is the one that was written last."""
        if message != self._last:
            self._last = message
            self._write(f"{message} ...")
