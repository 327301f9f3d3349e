"""Trackio: all metrics of a training, in a file of this machine or in a Space of the Hugging Face Hub."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from contextvars import copy_context
from typing import TYPE_CHECKING, Any

from pipekit.config.callbacks_config import TrackioConfig
from pipekit.plan.run_folder import RunFolder
from pipekit.training.shipped.shipped_callback import ShippedCallback
from pipekit.training.trial_callbacks import TrialCallback

if TYPE_CHECKING:
    from pipekit.training.context import TrialContext


class TrackioLogger(TrialCallback):
    """Logs to trackio, which keeps a run by its project and its name; `trackio show` opens its dashboard.

    A training that resumes from a checkpoint continues the run of that name.

    Args:
        config: the project, the name and the Space.
        folder: files of the run.
        settings: the configuration and the plan to show there.
    """

    def __init__(self, config: TrackioConfig, folder: RunFolder, settings: dict[str, Any]) -> None:
        self._config, self._folder, self._settings = config, folder, settings
        self._run: Any = None

    def on_trial_startup(self, first_batch_idx: int, checkpoint_uuid: str | None) -> None:
        self._run = start_trackio(
            self._config, self._folder, config=self._settings, resume="allow" if first_batch_idx else "never"
        )

    def on_metrics(self, step: int, metrics: dict[str, Any]) -> None:
        if self._run is not None:
            self._run.log(metrics, step=step)

    def on_trial_shutdown(self) -> None:
        if self._run is not None:
            finish_trackio(self._run)


class Trackio(ShippedCallback, TrackioLogger):
    """Callback that logs all metrics by batch, from the first rank.

    Args:
        context: context of the trial.
        settings: the project, the name and the Space.
    """

    def __init__(self, context: TrialContext, settings: TrackioConfig | None = None) -> None:
        ShippedCallback.__init__(self, context)
        TrackioLogger.__init__(self, settings or TrackioConfig(), context.folder, context.get_experiment_config())

    def on_trial_startup(self, first_batch_idx: int, checkpoint_uuid: str | None) -> None:
        if self.is_first:
            super().on_trial_startup(first_batch_idx, checkpoint_uuid)


def start_trackio(place: TrackioConfig, folder: RunFolder, **options: Any) -> Any:
    """Start the trackio run of a run folder, and return it."""
    import trackio

    with _silence():
        # In a context of its own it is not trackio's current run, of which trackio tells when the process exits.
        return copy_context().run(
            trackio.init,
            project=place.project,
            name=place.name or folder.path.absolute().name,
            space_id=place.space,
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
            **options,
        )


def finish_trackio(run: Any) -> None:
    """End a trackio run, after its metrics are stored."""
    with _silence():
        run.finish()


@contextmanager
def _silence() -> Iterator[None]:
    # It greets on stdout, where the progress line is.
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
        yield
