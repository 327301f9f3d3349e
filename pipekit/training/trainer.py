"""Trainer of a trial: checks before training, and the periods of reports, validations and checkpoints."""

from __future__ import annotations

import shutil
from contextlib import AbstractContextManager, ExitStack, nullcontext
from pathlib import Path
from typing import Any, Literal

import torch

from pipekit.checkpoint.retention import Retention, remove_leftovers
from pipekit.distributed.host_folders import HostFolders, check_folders
from pipekit.distributed.processes import run_together, tell_object
from pipekit.engine.base_engine import BaseEngine
from pipekit.errors import ConfigError, PipekitError
from pipekit.hangs.heartbeat import HeartbeatThread
from pipekit.hangs.monitor import HangReporter
from pipekit.plan.run_folder import RunFolder, check_run_folder
from pipekit.run_lock import hold_run
from pipekit.settings.duration import parse_duration
from pipekit.training.context import TrialContext
from pipekit.training.loggers import EventsFile, MetricsFile, TensorBoardLogger, TrialLog
from pipekit.training.periods import Batch, Period
from pipekit.training.shipped import build_shipped_callbacks
from pipekit.training.trial import Trial, check_trial, has_evaluation
from pipekit.training.trial_checkpoint import find_checkpoint
from pipekit.training.trial_loop import TrialLoop, TrialResult, TrialSchedule

# So many batches does a test go through everything.
_TEST_BATCHES = 2


class Trainer:
    """Trainer of a trial. Every rank builds one and calls `fit`.

    Args:
        trial: the trial to train.
        context: the context that the trial was built with.
    """

    def __init__(self, trial: Trial, context: TrialContext) -> None:
        self.trial = trial
        self.context = context

    def fit(
        self,
        checkpoint_period: Period | None = None,
        validation_period: Period | None = None,
        max_length: Period | None = None,
        reporting_period: Period = Batch(100),  # noqa: B008 - it is frozen
        checkpoint_policy: Literal["all", "best", "none"] = "best",
        latest_checkpoint: str | Path | None = None,
        step_zero_validation: bool = False,
        test_mode: bool = False,
        profiling_enabled: bool = False,
        *,
        best_metric: str | None = None,
        best_is: Literal["lowest", "highest"] = "lowest",
        retention: Retention | None = None,
        checkpoint_interval: str | None = "15m",
        checkpoint_on_error: Literal["stop", "warn"] = "stop",
    ) -> TrialResult:
        """Train until `max_length`, resuming from a checkpoint if there is one. All ranks call this together.

        At the end, the trainer reports, validates and saves a checkpoint, unless it has just done so.

        Args:
            checkpoint_period: period of checkpoints, in addition to those of the policy; None adds none.
            validation_period: period of validations; None validates only at the end.
            max_length: length of the training, including earlier starts.
            reporting_period: period of reports of training metrics.
            checkpoint_policy: validations after which to save a checkpoint: "all", "best" for those better than all
                before, or "none".
            latest_checkpoint: path of the checkpoint to resume from, or "never"; None takes the run's newest.
            step_zero_validation: whether to validate before the first batch.
            test_mode: whether to run only two batches, with all of the above, in a folder that is removed; the
                arguments above are then ignored.
            profiling_enabled: whether to profile a few batches if the trial has not called `set_profiler`.
            best_metric: validation metric by which to compare checkpoints; by default the first.
            best_is: whether its lowest or its highest value is the best.
            retention: checkpoints to keep; by default the newest two and the best under "best", and otherwise all.
            checkpoint_interval: longest time without a checkpoint, such as "1h"; None sets no limit. If `retention` is
                None and all checkpoints are kept, those saved by time are removed once there is a newer one.
            checkpoint_on_error: reaction to a checkpoint that the disk refuses: "stop" ends the training, "warn" prints
                a warning and tries again when the next checkpoint is due. The last checkpoint must always succeed.

        Raises:
            PipekitError: on every rank, if the trial breaks a rule or cannot continue.
        """
        periods: dict[str, Any] = {
            "max_length": max_length,
            "reporting_period": reporting_period,
            "validation_period": validation_period,
            "checkpoint_period": checkpoint_period,
        }
        if test_mode:
            two = Batch(_TEST_BATCHES)
            periods = dict.fromkeys(periods, two) | {"reporting_period": Batch(1)}
            latest_checkpoint, step_zero_validation = "never", True
        run_together(self._check, periods, checkpoint_policy, best_is, checkpoint_on_error, test_mode)
        save_every_s = run_together(_seconds_of, checkpoint_interval)
        if profiling_enabled and self.context.profiler is None:
            self.context.set_profiler(schedule=torch.profiler.schedule(wait=1, warmup=1, active=3, repeat=1))
        is_first = self.context.distributed.rank == 0
        own_folder = self.context.folder
        held = ExitStack()
        if not self.context.is_watched:  # or else its launcher holds the folder
            run_together(lambda: self._take_folder(held) if is_first else None)
        check_folders(own_folder.path, HostFolders.find(own_folder.path), are_shared=True)
        self.context.folder = folder = RunFolder(own_folder.path / ".test-mode") if test_mode else own_folder
        evaluates = has_evaluation(self.trial)
        try:
            loop = TrialLoop(
                self.trial,
                TrialSchedule(
                    **periods,
                    checkpoint_policy=checkpoint_policy,
                    step_zero_validation=step_zero_validation,
                    evaluates=evaluates,
                    best_metric=best_metric,
                    best_is=best_is,
                    retention=retention,
                    most_evaluations=_TEST_BATCHES if test_mode else None,
                    save_every_s=None if test_mode else save_every_s,
                    on_save_error=checkpoint_on_error,
                ),
                folder.checkpoints,
                shipped=run_together(lambda: build_shipped_callbacks(self.trial, evaluates=evaluates)),
                here=[
                    MetricsFile(folder, self.context.warn),
                    EventsFile(folder, self.context.warn, self._about()),
                    TrialLog(),
                    TensorBoardLogger(self.context, self.context.get_experiment_config()),
                ]
                if is_first
                else [],
            )
            found = run_together(lambda: find_checkpoint(latest_checkpoint, folder.checkpoints) if is_first else None)
            path, warning = tell_object(None if found is None else (str(found[0] or ""), found[1]))
            start = Path(path) if path else None
            with self._heartbeat((own_folder if self.context.is_watched else folder).logs):
                return loop.fit(start, tries_earlier=latest_checkpoint is None, warning=warning)
        finally:
            self.context.folder = own_folder
            if test_mode and is_first:
                shutil.rmtree(folder.path, ignore_errors=True)
            held.close()

    def _take_folder(self, held: ExitStack) -> None:
        folder = self.context.folder
        held.enter_context(hold_run(folder.path))
        check_run_folder(folder)
        remove_leftovers(folder.checkpoints)

    def _about(self) -> str:
        """Description of this start's layout."""
        return f"{self.context.models[0].mpu.layout} on {self.context.device.type}"

    def _heartbeat(self, logs: Path) -> AbstractContextManager[object]:
        """Heartbeat of this rank, written to the log folder for hang reports; none if there is only one rank."""
        context = self.context
        mpu, size = context.models[0].mpu, context.distributed.size
        if size == 1 and not context.is_watched:
            return nullcontext()
        logs.mkdir(parents=True, exist_ok=True)
        return HeartbeatThread(
            context.activity,
            logs,
            rank=context.distributed.rank,
            world_size=size,
            stages=mpu.stages if context.use_pipeline_parallel else (),
            pipe_ranks=mpu.pipe.ranks,
            on_beat=None
            if context.is_watched
            else HangReporter(logs, size, context.config.run.timeout_s, context.terminal),
        )

    def _check(
        self,
        periods: dict[str, Period | None],
        checkpoint_policy: str,
        best_is: str,
        checkpoint_on_error: str,
        test_mode: bool,
    ) -> None:
        """Check the trial and the arguments of this rank."""
        trial, context = self.trial, self.context
        check_trial(type(trial))
        if getattr(trial, "context", context) is not context:
            raise PipekitError(f"{type(trial).__name__} was built with another context than the Trainer's")
        trial.context = context
        for name, value in vars(trial).items():
            if isinstance(value, BaseEngine) and not any(value is engine for engine in context.models):
                raise PipekitError(
                    f"{type(trial).__name__}.{name} is an engine that no checkpoint would hold; write self.{name} = "
                    "context.wrap_model_engine(engine)"
                )
        if not context.models:
            raise PipekitError(
                f"{type(trial).__name__} has wrapped no engine; in __init__, make one with pipekit.initialize(...) and "
                "call context.wrap_model_engine(engine)"
            )
        for argument, period in periods.items():
            if not isinstance(period, Period) and (
                period is not None or argument in ("max_length", "reporting_period")
            ):
                raise ConfigError(f"{argument}={period!r}: must be a period; for example {argument}=pipekit.Batch(100)")
        validation = periods["validation_period"]
        if validation is not None and not has_evaluation(trial) and not test_mode:
            raise PipekitError(
                f"validation_period={validation}: {type(trial).__name__} has no evaluation; write evaluate_batch and "
                "build_validation_data_loader, or leave validation_period out"
            )
        if checkpoint_policy not in ("all", "best", "none"):
            raise ConfigError(f"checkpoint_policy={checkpoint_policy!r}: must be all, best or none")
        if best_is not in ("lowest", "highest"):
            raise ConfigError(f"best_is={best_is!r}: must be lowest or highest")
        if checkpoint_on_error not in ("stop", "warn"):
            raise ConfigError(f"checkpoint_on_error={checkpoint_on_error!r}: must be stop or warn")


def _seconds_of(checkpoint_interval: str | None) -> float | None:
    if checkpoint_interval is None:
        return None
    try:
        return parse_duration(checkpoint_interval)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"checkpoint_interval={checkpoint_interval!r}: {error}") from None
