"""Report: the run's page, `report.html`, which is updated during the run."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from pipekit.pages.run_page import write_run_page
from pipekit.pages.run_record import RunRecord
from pipekit.plan.run_folder import RunFolder
from pipekit.training.shipped.shipped_callback import ShippedCallback
from pipekit.training.trial_callbacks import TrialCallback

if TYPE_CHECKING:
    from pipekit.training.context import TrialContext

# Half a per cent of the training's time at most.
_PAUSES = 200
_SHORTEST_PAUSE_S = 5.0


class ReportFile(TrialCallback):
    """Writes the page of a run after validations and checkpoints, now and then, and at its end.

    The next page waits 200 times as long as the last one took, so that a page of a long run costs little. If one cannot
    be written, for example because the disk is full, one warning says so, and the training goes on.

    Args:
        folder: the run's files.
        warn: called with a message where the page cannot be written.
    """

    def __init__(self, folder: RunFolder, warn: Callable[[str], None]) -> None:
        self._folder, self._warn = folder, warn
        self._next_s = 0.0
        self._has_begun = self._has_warned = False

    def on_trial_startup(self, first_batch_idx: int, checkpoint_uuid: str | None) -> None:
        self._has_begun = True

    def on_metrics(self, step: int, metrics: dict[str, Any]) -> None:
        if any(name.startswith("val_") for name in metrics):
            self._write_now_and_then()

    def on_checkpoint_upload_end(self, uuid: str) -> None:
        self._write_now_and_then()

    def on_trial_shutdown(self) -> None:
        if self._has_begun:
            self._write()

    def _write_now_and_then(self) -> None:
        if time.monotonic() >= self._next_s:
            self._write()

    def _write(self) -> None:
        began_s = time.monotonic()
        try:
            write_run_page([RunRecord.read(self._folder.path)], self._folder.report)
        except Exception as error:
            # Whatever is wrong with a page, the training is worth more.
            if not self._has_warned:
                self._warn(f"{self._folder.report}: {error}; training goes on without its page")
            self._has_warned = True
        ended_s = time.monotonic()
        self._next_s = ended_s + max(_SHORTEST_PAUSE_S, _PAUSES * (ended_s - began_s))


class Report(ShippedCallback):
    """Callback that keeps the page of a trial's run up to date, from the first rank.

    Args:
        context: context of the trial.
    """

    def __init__(self, context: TrialContext) -> None:
        super().__init__(context)
        self._file = ReportFile(context.folder, context.warn)

    def on_trial_startup(self, first_batch_idx: int, checkpoint_uuid: str | None) -> None:
        self._file.on_trial_startup(first_batch_idx, checkpoint_uuid)

    def on_metrics(self, step: int, metrics: dict[str, Any]) -> None:
        if self.is_first:
            self._file.on_metrics(step, metrics)

    def on_checkpoint_upload_end(self, uuid: str) -> None:
        if self.is_first:
            self._file.on_checkpoint_upload_end(uuid)

    def on_trial_shutdown(self) -> None:
        if self.is_first:
            self._file.on_trial_shutdown()
