"""Progress of a trial on the terminal: a bar there, and plain lines where the output goes elsewhere."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as ProgressBar

from pipekit.training.console import RemainingColumn, make_console, show_time
from pipekit.training.shipped.shipped_callback import ShippedCallback

if TYPE_CHECKING:
    from pipekit.training.context import TrialContext


class Progress(ShippedCallback):
    """Shows reports, validations and checkpoints, from the first rank.

    Args:
        context: the trial's, to whose `terminal` it writes.
    """

    def __init__(self, context: TrialContext) -> None:
        super().__init__(context)
        self._console = make_console(context.terminal)
        self._shown: dict[str, str] = {}
        self._bar: ProgressBar | None = None
        self._first, self._started_s = 0, time.monotonic()

    def on_trial_startup(self, first_batch_idx: int, checkpoint_uuid: str | None) -> None:
        if not self.is_first:
            return
        self._first, self._started_s = first_batch_idx, time.monotonic()
        if checkpoint_uuid is not None:
            self._console.print(f"going on from {checkpoint_uuid}", markup=False)
        if self._console.is_terminal:
            self._bar = ProgressBar(
                TextColumn("batch {task.completed}/{task.total}"),
                BarColumn(bar_width=24),
                TextColumn("{task.fields[metrics]}", markup=False),
                RemainingColumn(),
                TimeElapsedColumn(),
                console=self._console,
            )
            total = self.context.num_batches
            self._task = self._bar.add_task("train", total=total, completed=first_batch_idx, metrics="")
            self._bar.start()

    def on_warning(self, message: str) -> None:
        if self.is_first:
            self._console.print(f"warning: {message}", style="yellow", markup=False)

    def on_validation_start(self) -> None:
        if self._bar is not None:
            self._bar.update(self._task, metrics="validating")

    def on_metrics(self, step: int, metrics: dict[str, Any]) -> None:
        if not self.is_first:
            return
        texts = {name: f"{name} {value:.6g}" for name, value in metrics.items()}
        self._shown |= texts
        if self._bar is not None:
            self._bar.update(self._task, completed=step, metrics="  ".join(self._shown.values()))
        else:
            self._console.print("  ".join([self._place(), *texts.values(), *self._remaining()]), markup=False)

    def on_checkpoint_upload_end(self, uuid: str) -> None:
        if self.is_first and self._bar is None:
            self._console.print(f"{self._place()}  saved {self.context.folder.checkpoints / uuid}", markup=False)

    def on_trial_shutdown(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _place(self) -> str:
        total = self.context.num_batches
        return f"batch {self.context.num_trained_batches:>{len(str(total))}}/{total}"

    def _remaining(self) -> list[str]:
        """Time until the end at the pace of this start, once there is a pace and something remains."""
        done, total = self.context.num_trained_batches, self.context.num_batches
        if not self._first < done < total:
            return []
        batch_s = (time.monotonic() - self._started_s) / (done - self._first)
        return [f"ETA {show_time(batch_s * (total - done))}"]
