"""Checkpoints of a training as it runs: written now or in the background, replaced, warned of where they are slow."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from pipekit.checkpoint.manifest import checkpoint_name
from pipekit.checkpoint.retention import remove_checkpoint
from pipekit.distributed.processes import gather_objects
from pipekit.engine.save import PendingCheckpoint
from pipekit.errors import StorageError
from pipekit.training.context import TrialContext
from pipekit.training.requests import Requests
from pipekit.training.slow_saves import SlowSaves
from pipekit.training.trial_callbacks import Callbacks


class TrialSaves:
    """Saves of one training, one after the other. All ranks make one together, and call its methods together.

    Args:
        context: the training's.
        callbacks: called when a checkpoint is on the disk, and with warnings.
        requests: told of each save.
        on_error: whether the training stops where a checkpoint cannot be written, or goes on with a warning.
        unit: what the training counts, such as "batch".
        how_to_save_faster: advice where saves hold the training up.

    Attributes:
        newest: the newest checkpoint that is on the disk, which may come from an earlier start; None before the first.
    """

    def __init__(
        self,
        context: TrialContext,
        callbacks: Callbacks,
        requests: Requests,
        *,
        on_error: Literal["stop", "warn"],
        unit: str,
        how_to_save_faster: str,
    ) -> None:
        self._context, self._callbacks, self._requests = context, callbacks, requests
        self._on_error, self._unit, self._how_to_save_faster = on_error, unit, how_to_save_faster
        self.newest: Path | None = None
        self._pending: PendingCheckpoint | None = None
        self._temporary: Path | None = None
        self._superseded: Path | None = None
        self._slow_saves: SlowSaves | None = SlowSaves()  # until it has warned of one

    def save(self, batch: int, write: Callable[[], PendingCheckpoint], *, is_temporary: bool, is_final: bool) -> bool:
        """Save, or start to; return False where that has failed and the training goes on.

        Args:
            batch: number of batches trained.
            write: writes the checkpoint, or starts to.
            is_temporary: whether the checkpoint is removed once there is a newer one.
            is_final: whether the training is about to end, and cannot go on without it.
        """
        if self._slow_saves is not None:
            self._slow_saves.begin()
        self.finish()
        name = checkpoint_name(batch)
        self._context.activity.begin(f"checkpoint {name}", f"writing {name}")
        has_failed = False
        try:
            self._pending = write()
        except StorageError as error:
            has_failed = not is_final and self._goes_on_without(error)
            if not has_failed:
                raise
        else:
            self._superseded, self._temporary = self._temporary, self._pending.path if is_temporary else None
            if not self._pending.in_background:
                self.finish()
        self._requests.note_save()
        if not (has_failed or is_final):
            self._warn_if_slow(batch)
        return not has_failed

    def finish(self, *, is_final: bool = False) -> None:
        """Wait until the last checkpoint is on the disk, and call callbacks."""
        pending = self._pending
        if pending is None:
            return
        if not pending.is_done:
            name = pending.path.name
            self._context.activity.begin(f"checkpoint {name}", f"waiting until {name} is written")
        self._pending = None
        try:
            self.newest = pending.wait()
        except StorageError as error:
            if is_final or not self._goes_on_without(error):
                raise
            self._temporary, self._superseded = self._superseded, None
            return
        self._requests.note_written(pending.seconds)
        if self._slow_saves is not None:
            self._slow_saves.write_s = pending.seconds
        if self._superseded is not None and self._context.distributed.rank == 0:
            with contextlib.suppress(OSError):
                remove_checkpoint(self._superseded)
        self._superseded = None
        self._callbacks.call("on_checkpoint_upload_end", pending.path.name)

    def settle(self) -> None:
        """Let a save in the background end where the training has failed; each rank does this by itself."""
        if self._pending is not None:
            self._pending.settle(self._context.config.run.timeout_s)

    def _goes_on_without(self, error: StorageError) -> bool:
        """Warn that a checkpoint could not be written; False if the training cannot go on without it."""
        if self._on_error == "stop" or not error.is_everyones:
            return False
        self._callbacks.call(
            "on_warning",
            f"{error}; training goes on, and saves again when that is due; the newest checkpoint is "
            f"{self.newest or 'none yet'}",
        )
        return True

    def _warn_if_slow(self, batch: int) -> None:
        """Warn once that saves take too much of the training's time."""
        if self._slow_saves is None:
            return
        stood_s, passed_s = gather_objects(self._slow_saves.end())[0]
        warning = self._slow_saves.describe(stood_s, passed_s, self._newest_bytes, remedy=self._how_to_save_faster)
        if warning is not None:
            self._slow_saves = None
            self._callbacks.call("on_warning", f"{self._unit} {batch}: {warning}")

    def _newest_bytes(self) -> int:
        if self.newest is None:
            return 0
        try:
            return sum(path.stat().st_size for path in self.newest.rglob("*") if path.is_file())
        except OSError:
            return 0
