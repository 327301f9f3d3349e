"""Progress of a trial: a live line on a terminal, and plain lines in any other output."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from pipekit.training.console import make_console
from pipekit.training.shipped.shipped_callback import ShippedCallback
from pipekit.training.step_line import LinePart, StepLine, show_time

if TYPE_CHECKING:
    from pipekit.training.context import TrialContext


class Progress(ShippedCallback):
    """Callback that shows reports, validations and checkpoints, from the first rank.

    Args:
        context: context of the trial; it writes to the context's `terminal`.
    """

    def __init__(self, context: TrialContext) -> None:
        super().__init__(context)
        self._console = make_console(context.terminal)
        self._shown: dict[str, str] = {}
        self._line: StepLine | None = None
        self._first, self._started_s = 0, time.monotonic()

    def on_trial_startup(self, first_batch_idx: int, checkpoint_uuid: str | None) -> None:
        if not self.is_first:
            return
        self._first, self._started_s = first_batch_idx, time.monotonic()
        if checkpoint_uuid is not None:
            self._console.print(f"going on from {checkpoint_uuid}", markup=False)
        if self._console.is_terminal:
            self._line = StepLine("batch", first_batch_idx, self.context.num_batches)
            self._line.show(self._console)

    def on_warning(self, message: str) -> None:
        if self.is_first:
            self._console.print(f"warning: {message}", style="yellow", markup=False)

    def on_validation_start(self) -> None:
        if self._line is not None:
            self._line.parts = [*self._line.parts, LinePart("validating", 1)]

    def on_metrics(self, step: int, metrics: dict[str, Any]) -> None:
        if not self.is_first:
            return
        texts = {name: f"{name} {value:.6g}" for name, value in metrics.items()}
        self._shown |= texts
        if self._line is not None:
            # The first that were reported are the last to be left out, and the very first never is.
            self._line.parts = [LinePart(text, index) for index, text in enumerate(self._shown.values())]
            self._line.done, self._line.remaining_s = step, self._remaining_s()
        else:
            remaining_s = self._remaining_s()
            remaining = [] if remaining_s is None else [f"ETA {show_time(remaining_s)}"]
            self._console.print("  ".join([self._place(), *texts.values(), *remaining]), markup=False)

    def on_checkpoint_upload_end(self, uuid: str) -> None:
        if self.is_first:
            self._console.print(f"{self._place()}  saved {self.context.folder.checkpoints / uuid}", markup=False)

    def on_trial_shutdown(self) -> None:
        if self._line is not None:
            self._line.end()
            self._line = None

    def _place(self) -> str:
        total = self.context.num_batches
        return f"batch {self.context.num_trained_batches:>{len(str(total))}}/{total}"

    def _remaining_s(self) -> float | None:
        """Seconds until the end at the pace of this start, once there is a pace and something remains."""
        done, total = self.context.num_trained_batches, self.context.num_batches
        if not self._first < done < total:
            return None
        return (time.monotonic() - self._started_s) / (done - self._first) * (total - done)
