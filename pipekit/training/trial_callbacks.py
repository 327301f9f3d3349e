"""Callbacks: methods called at each event of a training, whose exceptions stop all ranks."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING, Any

from pipekit.distributed.processes import gather_objects, raise_together
from pipekit.errors import CheckpointError, PipekitError
from pipekit.hangs.activity import Activity

if TYPE_CHECKING:
    from pipekit.training.trial_loop import TrialResult


class TrialCallback:
    """Base class of callbacks: a method for each event of a training. Override the ones that you need.

    The callbacks of a `Trial` are called on every rank; an exception in one of them ends the training on all ranks,
    with a message that names the callback and the event. The callbacks of a `LayersTrial` are called on the rank that
    reports.
    """

    def on_trial_startup(self, first_batch_idx: int, checkpoint_uuid: str | None) -> None:
        """Called when the trial is set up.

        Args:
            first_batch_idx: batches that were trained up to the checkpoint that the run resumes from; 0 without one.
            checkpoint_uuid: name of that checkpoint, if any.
        """

    def on_trial_shutdown(self) -> None:
        """Called when the training has ended or failed: close files and connections."""

    def on_training_start(self) -> None:
        """Called before the first batch of this start is trained."""

    def on_training_epoch_start(self, epoch_idx: int) -> None:
        """Called when the next batch begins an epoch, and after a resume within an epoch."""

    def on_training_epoch_end(self, epoch_idx: int) -> None:
        """Called when an epoch has ended."""

    def on_training_workload_end(self, avg_metrics: dict[str, Any], batch_metrics: list[dict[str, float]]) -> None:
        """Called when training metrics are reported.

        Args:
            avg_metrics: metrics over the batches since the last report and over ranks.
            batch_metrics: this rank's metrics of each call of `train_batch` since then; empty if it does not report.
        """

    def training_metrics(self) -> dict[str, float]:
        """Return numbers to report with the training metrics, the same on all ranks; all ranks call this together."""
        return {}

    def validation_metrics(self) -> dict[str, float]:
        """Return numbers to report with the validation metrics, the same on all ranks; all ranks call this together.

        It is called after the last batch of the validation, while plain modules are still in evaluation mode.
        """
        return {}

    def on_metrics(self, step: int, metrics: dict[str, Any]) -> None:
        """Called when all metrics of a batch are known: those of training, and those of validations as `val_*`.

        If a `LayersTrial` on a GPU reports every batch, the next batch may already have been trained and the weights
        updated, unless a checkpoint follows.

        Args:
            step: batches trained, including this one; 0 for a validation before the first.
            metrics: the metrics by name.
        """

    def on_warning(self, message: str) -> None:
        """Called with a warning about a training that continues; it may come before `on_trial_startup`."""

    def on_profile(self, text: str) -> None:
        """Called when the steps of `profile` have been measured; `text` is their table."""

    def on_rollback(self, batch: int) -> None:
        """Called when the training returns to the checkpoint after `batch` batches; later batches are trained again."""

    def on_training_end(self, result: TrialResult) -> None:
        """Called when the training has ended; not when an error, a signal or `run.max_time` has cut it short."""

    def on_validation_start(self) -> None:
        """Called before a validation."""

    def on_validation_epoch_start(self) -> None:
        """Called before the batches of a validation are evaluated."""

    def on_validation_epoch_end(self, outputs: list[dict[str, float]]) -> None:
        """Called after all batches are evaluated; `outputs` are this rank's metrics of each `evaluate_batch` call."""

    def on_validation_end(self, metrics: dict[str, Any]) -> None:
        """Called with the metrics of a validation that has ended."""

    def on_checkpoint_load_start(self, checkpoint: dict[str, Any]) -> None:
        """Called before a checkpoint is loaded; `checkpoint` holds its content other than the engines' states."""

    def on_checkpoint_save_start(self, checkpoint: dict[str, Any]) -> None:
        """Called before a checkpoint is saved; it also saves values added to `checkpoint`, if JSON can hold them."""

    def on_checkpoint_write_end(self, checkpoint_dir: str) -> None:
        """Called when a checkpoint has been written to a folder that does not have its final name yet."""

    def on_checkpoint_upload_end(self, uuid: str) -> None:
        """Called when a checkpoint is complete and has its final name."""

    def state_dict(self) -> dict[str, Any]:
        """Return the callback's state for checkpoints: numbers, texts, lists and dicts."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the callback's state from a checkpoint."""


class Callbacks:
    """The callbacks of a training: those of the trial by name, called together on all ranks, and this rank's own.

    Args:
        callbacks: what the trial's `build_callbacks` returned.
        shipped: callbacks that the configuration switches on; a callback of the trial with the same name replaces one.
        here: callbacks of this rank only, which are called first, and whose exceptions are raised only here.
        activity: where this rank notes that it is calling callbacks.

    Attributes:
        batch: batches trained so far.

    Raises:
        PipekitError: on every rank, if `callbacks` is not a dict of callbacks, or ranks have different ones.
    """

    def __init__(
        self,
        callbacks: Any,
        shipped: Mapping[str, TrialCallback],
        here: Sequence[TrialCallback],
        activity: Activity,
    ) -> None:
        error = None
        if not isinstance(callbacks, Mapping) or not all(
            isinstance(name, str) and isinstance(each, TrialCallback) for name, each in callbacks.items()
        ):
            error = PipekitError(
                "build_callbacks must return a dict of TrialCallback objects by name, such as {'stopping': Stopping()}"
            )
        raise_together(error)
        self.batch = 0
        self._callbacks: dict[str, TrialCallback] = {**shipped, **callbacks}
        self._here, self._activity = here, activity
        everyones = gather_objects([f"{name} ({type(callback).__qualname__})" for name, callback in callbacks.items()])
        for rank, theirs in enumerate(everyones):
            if theirs != everyones[0]:
                raise PipekitError(
                    f"build_callbacks returned {', '.join(everyones[0]) or 'none'} on rank 0 and "
                    f"{', '.join(theirs) or 'none'} on rank {rank}; return the same on all ranks"
                )

    def call(self, event: str, *args: Any) -> None:
        """Call an event of every callback that handles it. All ranks call this together.

        Raises:
            PipekitError: on every rank, if a callback of the trial raises on any rank.
        """
        base = getattr(TrialCallback, event)
        here = [each for each in self._here if getattr(type(each), event) is not base]
        together = [each for each in self._callbacks.items() if getattr(type(each[1]), event) is not base]
        if not (here or together):
            return
        self._activity.begin(f"callbacks after step {self.batch}", "calling callbacks")
        for callback in here:
            getattr(callback, event)(*args)
        error = None
        for name, callback in together:
            try:
                getattr(callback, event)(*args)
            except Exception as failure:
                error = _named(name, event, failure)
                break
        if together:
            raise_together(error)

    def training_metrics(self) -> dict[str, float]:
        """Return the numbers that callbacks report with the training metrics. All ranks call this together."""
        return self._gather("training_metrics")

    def validation_metrics(self) -> dict[str, float]:
        """Return the numbers that callbacks report with the validation metrics. All ranks call this together."""
        return self._gather("validation_metrics")

    def _gather(self, method: str) -> dict[str, float]:
        metrics: dict[str, float] = {}
        for name, callback in self._callbacks.items():
            if getattr(type(callback), method) is getattr(TrialCallback, method):
                continue
            error = None
            try:
                metrics |= getattr(callback, method)()
            except Exception as failure:
                error = _named(name, method, failure)
            # After each, since one may wait for the other ranks.
            raise_together(error)
        return metrics

    def shut_down(self, *, has_failed: bool) -> None:
        """Tell every callback that the training has ended; all ranks call this together unless it has failed."""
        here, self._here = self._here, []
        with ExitStack() as stack:
            for callback in reversed(here):
                stack.callback(callback.on_trial_shutdown)
            if not has_failed:
                self.call("on_trial_shutdown")
                return
            for callback in self._callbacks.values():
                with suppress(Exception):
                    callback.on_trial_shutdown()

    def state_dict(self) -> dict[str, Any]:
        """Return the states of all callbacks. All ranks call this together; the caller stores those of rank 0."""
        states: dict[str, Any] = {}
        error: PipekitError | None = None
        for name, callback in self._callbacks.items():
            try:
                states[name] = json.loads(json.dumps(callback.state_dict()))
            except Exception as failure:
                error = _named(name, "state_dict", failure)
                break
        raise_together(error)
        return states

    def load_state_dict(self, states: Mapping[str, Any]) -> None:
        """Restore the state of each callback. All ranks call this together."""
        error = None
        for name, callback in self._callbacks.items():
            if name not in states:
                continue
            try:
                callback.load_state_dict(states[name])
            except Exception as failure:
                error = _named(name, "load_state_dict", failure)
                break
        raise_together(error)


def _named(name: str, event: str, failure: Exception) -> PipekitError:
    text = f"callback {name!r}: {event} raised {type(failure).__name__}: {failure}"
    if event == "state_dict":
        return CheckpointError(f"{text}; checkpoints hold numbers, texts, lists and dicts")
    error = PipekitError(text)
    error.__cause__ = failure
    return error
