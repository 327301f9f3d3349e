"""Progress of preparing on a console: a bar on a terminal, and lines elsewhere."""

from __future__ import annotations

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.text import Text

from pipekit.progress import ProgressLines
from pipekit.training.step_line import show_time


class ProgressBar:
    """Shows what is being done, with a bar where the fraction is known; use it as a context manager.

    Each message stays as a line. Called as a `ProgressCallback`.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._lines = ProgressLines(lambda line: console.print(line, markup=False, highlight=False))
        self._message = ""
        self._bar: Progress | None = None

    def __enter__(self) -> ProgressBar:
        return self

    def __call__(self, message: str, fraction: float | None = None) -> None:
        """Show the message, and the fraction that is done."""
        if not self._console.is_terminal or fraction is None:
            self._end_bar()
            self._lines(message)
            return
        if message != self._message or self._bar is None:
            self._end_bar()
            self._message = message
            columns = (BarColumn(bar_width=24), TaskProgressColumn(), RemainingColumn(), TimeElapsedColumn())
            self._bar = Progress(TextColumn("{task.description}"), *columns, console=self._console)
            self._task = self._bar.add_task(message, total=1.0)
            self._bar.start()
        self._bar.update(self._task, completed=fraction)

    def _end_bar(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def __exit__(self, *exception: object) -> None:
        self._end_bar()


class RemainingColumn(ProgressColumn):
    """Time until the end at the pace so far."""

    def render(self, task: Task) -> Text:
        return Text("ETA --:--" if task.time_remaining is None else f"ETA {show_time(task.time_remaining)}", "cyan")
