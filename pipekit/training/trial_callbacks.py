"""Callbacks: what happens beside a training at each event, and how their exceptions stop all ranks."""

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
    """The events of a training. Override those that matter.

    Those of a `Trial` are called on every rank, and an exception in one of them ends the training on all, with a
    message that names the callback and the event. Those of a `LayersTrial` are called on the rank that reports.
    """

    def on_trial_startup(self, first_batch_idx: int, checkpoint_uuid: str | None) -> None:
        """The trial is set up; `first_batch_idx` batches were trained by the checkpoint of that name, if any."""

    def on_trial_shutdown(self) -> None:
        """The training has ended, or failed: let go of files and connections."""

    def on_training_start(self) -> None:
        """The first batch of this start is about to be trained."""

    def on_training_epoch_start(self, epoch_idx: int) -> None:
        """An epoch begins with the next batch; also called after a resume within an epoch."""

    def on_training_epoch_end(self, epoch_idx: int) -> None:
        """An epoch has ended."""

    def on_training_workload_end(self, avg_metrics: dict[str, Any], batch_metrics: list[dict[str, float]]) -> None:
        """Training metrics are reported.

        Args:
            avg_metrics: over the batches and ranks since the last report.
            batch_metrics: this rank's metrics of each call of `train_batch` since then; none where it does not report.
        """

    def training_metrics(self) -> dict[str, float]:
        """Return numbers to report with the metrics of training, the same on all ranks, which call this together."""
        return {}

    def validation_metrics(self) -> dict[str, float]:
        """Return numbers to report with the metrics of a validation, the same on all ranks, which call this together.

        It is called after the batches of the validation, where plain modules are in evaluation mode.
        """
        return {}

    def on_metrics(self, step: int, metrics: dict[str, Any]) -> None:
        """All metrics of a batch are known: reported ones of training, and those of validations as `val_*`.

        Where every batch of layers on a GPU is reported, the next one may have been trained by now, weights included,
        unless a checkpoint follows.

        Args:
            step: batches trained, this one included; 0 for a validation before the first.
            metrics: the metrics by name.
        """

    def on_warning(self, message: str) -> None:
        """Something is not as it should be, and the training goes on; also before `on_trial_startup`."""

    def on_profile(self, text: str) -> None:
        """The steps of `profile` have been measured; `text` is their table."""

    def on_rollback(self, batch: int) -> None:
        """The training goes back to an earlier checkpoint, after `batch` batches; those since will be trained again."""

    def on_training_end(self, result: TrialResult) -> None:
        """The training has ended as planned."""

    def on_validation_start(self) -> None:
        """The validation is about to begin."""

    def on_validation_epoch_start(self) -> None:
        """The batches of the validation are about to be evaluated."""

    def on_validation_epoch_end(self, outputs: list[dict[str, float]]) -> None:
        """All batches have been evaluated; `outputs` are this rank's metrics of each call of `evaluate_batch`."""

    def on_validation_end(self, metrics: dict[str, Any]) -> None:
        """The validation has ended with these metrics."""

    def on_checkpoint_load_start(self, checkpoint: dict[str, Any]) -> None:
        """A checkpoint is about to be loaded; `checkpoint` is what it holds beside the engines."""

    def on_checkpoint_save_start(self, checkpoint: dict[str, Any]) -> None:
        """A checkpoint is about to be saved; what is put into `checkpoint` is saved along, where JSON can hold it."""

    def on_checkpoint_write_end(self, checkpoint_dir: str) -> None:
        """A checkpoint has been written into a folder, which has not got its final name yet."""

    def on_checkpoint_upload_end(self, uuid: str) -> None:
        """A checkpoint is whole, under its final name."""

    def state_dict(self) -> dict[str, Any]:
        """Return the state that checkpoints hold of the callback: numbers, texts, lists and dicts."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over what a checkpoint held of the callback."""


class Callbacks:
    """The callbacks of a training: those of the trial by name, called together on all ranks, and this rank's own.

    Args:
        callbacks: what the trial's `build_callbacks` returned.
        shipped: those that the configuration switches on; one of the trial's with the same name takes its place.
        here: callbacks of this rank alone, which are called first, and whose exceptions are raised here alone.
        activity: where this rank notes that it calls them.

    Attributes:
        batch: batches trained so far.

    Raises:
        PipekitError: on every rank, if that is no dict of callbacks, or ranks have different ones.
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
        """Call an event of every callback that has it. All ranks call this together.

        Raises:
            PipekitError: on every rank, if one of the trial's raises on any.
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
        """Return the numbers that callbacks report with the metrics of training. All ranks call this together."""
        return self._gather("training_metrics")

    def validation_metrics(self) -> dict[str, float]:
        """Return the numbers that callbacks report with those of a validation. All ranks call this together."""
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
        """Return the states of all callbacks. All ranks call this together; those of rank 0 are to be stored."""
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
        """Give each callback its own state. All ranks call this together."""
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
