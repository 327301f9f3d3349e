"""The training loop of every trial: batches, reports, validations and checkpoints, each exactly when it is due."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

from pipekit.checkpoint.manifest import earlier_checkpoints
from pipekit.checkpoint.retention import Retention
from pipekit.distributed.agreement import Agreement
from pipekit.distributed.processes import gather_objects, raise_together, run_together
from pipekit.distributed.rank_role import check_roles
from pipekit.engine.plain_engine import PlainEngine
from pipekit.engine.save import PendingCheckpoint
from pipekit.errors import ConfigError, DamagedCheckpointError, PipekitError, StoppedError
from pipekit.rng import fold_seed
from pipekit.signals import StopSignals
from pipekit.training.context import TrialContext
from pipekit.training.evaluation import EvaluationStopped, evaluate
from pipekit.training.nonfinite_losses import describe_nonfinite
from pipekit.training.periods import Pace, Period
from pipekit.training.reducers import Reducer
from pipekit.training.requests import Requests
from pipekit.training.trial import Trial, metrics_of
from pipekit.training.trial_callbacks import Callbacks, TrialCallback
from pipekit.training.trial_checkpoint import TrialState, load_trial_state, save_trial
from pipekit.training.trial_data import Feed, TrialData
from pipekit.training.trial_metrics import TrialMetrics
from pipekit.training.trial_saves import TrialSaves


@dataclass(frozen=True)
class TrialSchedule:
    """Schedule of a training: the arguments of `Trainer.fit` of these names.

    Attributes:
        evaluates: whether there are validations at all.
        most_evaluations: largest number of batches of a validation; None evaluates all.
        save_every_s: longest time without a checkpoint; None sets no limit.
        on_save_error: whether the training stops if a checkpoint cannot be written, or warns and continues.
    """

    max_length: Period
    reporting_period: Period
    validation_period: Period | None
    checkpoint_period: Period | None
    checkpoint_policy: Literal["all", "best", "none"]
    step_zero_validation: bool
    evaluates: bool
    best_metric: str | None = None
    best_is: Literal["lowest", "highest"] = "lowest"
    retention: Retention | None = None
    most_evaluations: int | None = None
    save_every_s: float | None = None
    on_save_error: Literal["stop", "warn"] = "stop"

    def __str__(self) -> str:
        return ", ".join(f"{name}={value}" for name, value in vars(self).items())

    @property
    def periods(self) -> list[Period]:
        """All periods that are given."""
        return [value for value in vars(self).values() if isinstance(value, Period)]


@dataclass(frozen=True)
class TrialResult:
    """Results of a training.

    Attributes:
        batch: total number of batches trained.
        checkpoint: the newest checkpoint; None if none was written.
        metrics: training metrics of the last report; None if there was no report.
        validation_metrics: metrics of the last validation; None if there was none.
        time_s: wall time of this start, without loading.
    """

    batch: int
    checkpoint: Path | None
    metrics: dict[str, Any] | None
    validation_metrics: dict[str, Any] | None
    time_s: float


class TrialLoop:
    """Training loop of a trial, from its checkpoint to its end. All ranks make one together, and call `fit`.

    Args:
        trial: the trial to train.
        schedule: periods and policies of the training.
        checkpoints: folder of the checkpoints, which every rank can see.
        shipped: callbacks by name that the configuration switches on, besides those of the trial.
        here: callbacks of this rank only.

    Raises:
        PipekitError: on every rank, if the roles, the callbacks or the loaders of the trial are wrong.
    """

    def __init__(
        self,
        trial: Trial,
        schedule: TrialSchedule,
        checkpoints: Path,
        *,
        shipped: Mapping[str, TrialCallback] = MappingProxyType({}),
        here: Sequence[TrialCallback] = (),
    ) -> None:
        self._trial, self._schedule, self._checkpoints = trial, schedule, checkpoints
        self._context: TrialContext = trial.context
        self._activity = self._context.activity
        self._compare_ranks()
        self._callbacks = Callbacks(run_together(trial.build_callbacks), shipped, here, self._activity)
        self._data = TrialData(trial, self._context)
        self._pace = self._find_pace()
        self._last = run_together(schedule.max_length.in_batches, self._pace)
        takes_batches = self._context.use_pipeline_parallel or self._context.accumulates_by_hand
        self._calls = 1 if takes_batches else self._context.num_micro_batches_per_slot
        self._metrics = self._build_metrics()
        self._signals = StopSignals()
        self._requests = Requests(
            Agreement(self._context.models[0].mpu),
            self._signals,
            has_clock=self._context.distributed.rank == 0,
            save_every_s=schedule.save_every_s,
            max_time_s=self._context.max_time_s,
            started_s=self._context.started_s,
            measure=self._measure,
        )
        self._saves = TrialSaves(
            self._context,
            self._callbacks,
            self._requests,
            on_error=schedule.on_save_error,
            unit=self._unit,
            how_to_save_faster=self._how_to_save_faster(),
        )
        self._context.should_stop = lambda: bool(self._requests.exchange())
        self._feed: Feed | None = None
        self._batch = 0
        self._has_unread = False
        self._has_warned = False
        self._owes_validation = False  # that of the checkpoint's batch, which a stop has cut short
        self._is_cut_short = False
        self._best: float | None = None
        self._told: dict[str, Any] = {}  # metrics of the last batch that had any
        self._training_metrics: dict[str, Any] | None = None
        self._validation_metrics: dict[str, Any] | None = None

    # What a run of layers does in its own way.

    _unit = "batch"

    def _how_to_go_on(self) -> str:
        return "to go on, start it again in the same way"

    def _how_to_save_faster(self) -> str:
        return "give longer periods between checkpoints, or a run.dir on a faster disk"

    def _measure(self) -> int:
        """Number of this rank, the largest of which over all ranks is known a batch later."""
        return 0

    def _build_metrics(self) -> TrialMetrics:
        return TrialMetrics(self._context, "train_batch", Reducer.AVG, for_training=True)

    def _write(self, state: TrialState) -> PendingCheckpoint:
        return save_trial(
            self._trial,
            self._callbacks,
            state,
            self._checkpoints,
            num_samples=self._batch * self._pace.samples,
            retention=self._retention(),
        )

    def _read(self, checkpoint: Path) -> TrialState:
        return load_trial_state(self._trial, self._callbacks, checkpoint)

    def _goes_back(self) -> bool:
        """Go back to an earlier checkpoint where that is called for; return whether it was."""
        return False

    def _compare_ranks(self) -> None:
        """Check that the roles of all ranks fit together, and that all have the same schedule."""
        everyones = gather_objects((self._context.role, str(self._schedule)))
        check_roles([role for role, _ in everyones])
        for rank, (_, theirs) in enumerate(everyones):
            if theirs != everyones[0][1]:
                raise PipekitError(
                    f"rank 0 trains with ({everyones[0][1]}), and rank {rank} with ({theirs}); call fit with the same "
                    "arguments on all ranks"
                )

    def _find_pace(self) -> Pace:
        context, length = self._context, self._data.epoch_micro_batches
        in_batch = context.num_micro_batches_per_slot * context.role.data_parallel_world_size
        pace = Pace(context.get_global_batch_size(), None if length is None else Fraction(in_batch, length))
        for period in self._schedule.periods:
            run_together(period.units_of, pace)
        return pace

    def fit(self, start: Path | None, *, tries_earlier: bool = False, warning: str = "") -> TrialResult:
        """Train to the end.

        Args:
            start: the checkpoint to resume from, the same on all ranks; None starts from the beginning.
            tries_earlier: whether to take the newest intact checkpoint before `start` if it is damaged.
            warning: a warning about a newer checkpoint that is damaged.

        Raises:
            StoppedError: on every rank, after a request to stop and a checkpoint of the last batch.
        """
        has_failed = True
        try:
            if warning:
                self._callbacks.call("on_warning", warning)
            self._begin(start, tries_earlier)
            started_s = time.perf_counter()
            profiler = self._context.profiler
            with contextlib.nullcontext() if profiler is None else profiler, contextlib.ExitStack() as signals:
                self._train(signals)
                self._saves.finish(is_final=True)
                self._requests.finish()
            time_s = time.perf_counter() - started_s
            result = TrialResult(
                self._batch, self._saves.newest, self._training_metrics, self._validation_metrics, time_s
            )
            if not self._is_cut_short:
                self._callbacks.call("on_training_end", result)
            has_failed = False
        finally:
            self._saves.settle()
            # Ends the processes that read data.
            self._feed = None
            self._context.close()
            self._callbacks.shut_down(has_failed=has_failed)
        if self._is_cut_short:
            raise StoppedError(
                f"stopped by {self._requests.describe()} after {self._unit} {self._batch} of {self._last}, saved in "
                f"{self._saves.newest}\n{self._how_to_go_on()}"
            )
        return result

    def _begin(self, start: Path | None, tries_earlier: bool) -> None:
        """Load the checkpoint to go on from, if there is one, and begin to read data where it stands."""
        state = TrialState("") if start is None else self._load(start, tries_earlier)
        self._batch, self._best = state.batch, state.best
        self._owes_validation = (
            self._batch > 0 and not _has_validation(state.metrics) and self._is_due(self._schedule.validation_period)
        )
        num_read = run_together(self._data.own_read, state.micro_batches)
        self._feed = run_together(self._data.training_feed, num_read)
        self._callbacks.batch = self._batch
        self._context.note_length(self._batch, self._last)
        self._callbacks.call("on_trial_startup", self._batch, self._saves.newest and self._saves.newest.name)

    def _load(self, checkpoint: Path, tries_earlier: bool) -> TrialState:
        self._activity.begin("start", f"loading {checkpoint.name}")
        self._saves.newest = checkpoint
        try:
            return self._read(checkpoint)
        except DamagedCheckpointError as damage:
            # Hosts whose folders differ take the same one.
            earlier = gather_objects(earlier_checkpoints(checkpoint))[0] if tries_earlier else []
            if not earlier:
                raise
            warning = f"{damage}; going on from {earlier[0]} instead"
        self._callbacks.call("on_warning", warning)
        return self._load(earlier[0], tries_earlier)

    def _train(self, signals: contextlib.ExitStack) -> None:
        schedule, pace, context, callbacks = self._schedule, self._pace, self._context, self._callbacks
        first = self._batch
        if schedule.evaluates and (self._owes_validation or (schedule.step_zero_validation and first == 0)):
            self._tell(reports=False, validates=True)
        # Before, there is nothing to save.
        signals.enter_context(self._signals.listening())
        if first < self._last:
            callbacks.call("on_training_start")
        while self._batch < self._last:
            self._goes_back()
            context.begin_batch(self._batch, pace)
            epoch = context.current_train_epoch()
            if self._batch == first or context.is_epoch_start():
                callbacks.call("on_training_epoch_start", epoch)
            self._activity.begin_step(self._batch + 1)
            try:
                self._train_batch(epoch)
            finally:
                # Of the batch before, which is reported even where this one fails.
                if self._has_unread:
                    self._tell(reports=True, validates=False)
            self._batch += 1
            callbacks.batch = self._batch
            context.end_batch()
            if context.profiler is not None:
                context.profiler.step()
            if context.is_epoch_end():
                callbacks.call("on_training_epoch_end", epoch)
            is_last = self._batch == self._last
            is_asked = bool(self._requests.exchange())
            reports = is_last or is_asked or schedule.reporting_period.is_due(self._batch, pace)
            validates = schedule.evaluates and (is_last or self._is_due(schedule.validation_period)) and not is_asked
            saves = is_last or is_asked or self._is_due(schedule.checkpoint_period)
            # Also after the first batch, so that most mistakes of a trial show at once.
            meets = validates or saves or self._requests.asks_save
            meets = meets or (self._metrics.gathers and (reports or self._batch == first + 1))
            if not (meets or (reports and self._metrics.are_here)):
                self._has_unread = reports
                continue
            stops = meets and self._meet()
            is_best = self._tell(reports=reports or stops, validates=validates)
            if validates and not (is_last or stops) and self._meet():
                # Because of what the validation has shown.
                stops, told = True, self._told
                if not reports:
                    self._tell(reports=True, validates=False)
                    self._told |= told
            if self._goes_back() or not meets:
                continue
            policy, is_asked = schedule.checkpoint_policy, bool(self._requests.exchange(at_once=True))
            saves = saves or is_asked or stops or (validates and policy == "all") or (is_best and policy == "best")
            if saves or self._requests.asks_save:
                is_final = is_last or is_asked or stops
                has_failed = not self._save(by_time=not saves, is_final=is_final)
                is_asked = bool(self._requests.exchange(at_once=True))
                if is_asked and has_failed:
                    self._save(by_time=False, is_final=True)
            is_whole = stops or (is_last and (not schedule.evaluates or _has_validation(self._told)))
            self._is_cut_short = is_asked and not is_whole
            if stops or is_asked:
                break

    def _is_due(self, period: Period | None) -> bool:
        return period is not None and period.is_due(self._batch, self._pace)

    def _train_batch(self, epoch: int) -> None:
        context, feed = self._context, self._feed
        seed, replica = context.config.seed, context.role.data_parallel_rank
        for micro_batch in range(self._calls):
            context.seed_generators(fold_seed(seed, "train_batch", self._batch, micro_batch, replica))
            if feed is not None:
                feed.num_samples = 0
            self._activity.note("calling train_batch")
            metrics = metrics_of(self._trial.train_batch(feed, epoch, self._batch))
            self._metrics.update(metrics, 0 if feed is None else feed.num_samples)
        if not (context.use_pipeline_parallel or context.accumulates_by_hand):
            self._check_accumulation()

    def _check_accumulation(self) -> None:
        """Note a fault where the trial steps its engines by hand and has not said so."""
        for index, engine in enumerate(self._context.models):
            assert isinstance(engine, PlainEngine)
            done = engine.micro_steps % self._calls
            if engine.boundary_is_set:
                what = "sets the boundary of gradient accumulation itself"
            elif done:
                what = f"has left engine {index} after {done} of {self._calls} micro-batches"
            else:
                continue
            self._metrics.fault = self._metrics.fault or PipekitError(
                f"train_batch {what}: it is called for each micro-batch, and makes one engine.step() for each; to "
                "accumulate by hand, call context.disable_auto_grad_accumulation() in __init__"
            )

    def _meet(self) -> bool:
        """Raise a fault of any rank on all of them, and return whether any asks for the end of the training."""
        raise_together(self._metrics.fault)
        return any(gather_objects(self._context.get_stop_requested()))

    def _tell(self, *, reports: bool, validates: bool) -> bool:
        """Report and validate what is due, and tell callbacks; return whether the validation is the best ever."""
        self._has_unread, self._told = False, {}
        if reports:
            metrics, batches = self._metrics.report()
            self._warn_of_losses(metrics, batches)
            self._training_metrics = {**metrics, **self._callbacks.training_metrics()}
            self._told |= self._training_metrics
            self._callbacks.call("on_training_workload_end", self._training_metrics, batches)
        is_best = validates and self._validate()
        if self._told:
            self._callbacks.call("on_metrics", self._batch, self._told)
        return is_best

    def _warn_of_losses(self, metrics: dict[str, Any], batches: list[dict[str, float]]) -> None:
        """Tell of a loss that is not finite, once until it is finite again."""
        if not self._metrics.gathers:
            return
        warning = describe_nonfinite(metrics, batches, batch=self._batch, calls=self._calls)
        if warning is not None and not self._has_warned:
            self._callbacks.call("on_warning", warning)
        self._has_warned = warning is not None

    def _validate(self) -> bool:
        """Validate, and return whether the metric by which checkpoints are compared is better than ever before."""
        schedule = self._schedule
        try:
            metrics = evaluate(self._trial, self._data, self._callbacks, most_batches=schedule.most_evaluations)
        except EvaluationStopped:
            return False
        self._validation_metrics = metrics
        self._told |= {f"val_{name}": value for name, value in metrics.items()}
        name = self._best_metric()
        value = math.nan if name is None else float(metrics[name])
        sign = 1 if schedule.best_is == "lowest" else -1
        is_best = not math.isnan(value) and (self._best is None or sign * value < sign * self._best)
        if is_best:
            self._best = value
        return is_best

    def _best_metric(self) -> str | None:
        """Name of the metric by which checkpoints are compared; None before the first validation."""
        metrics, name = self._validation_metrics or {}, self._schedule.best_metric
        if name is not None and metrics and name not in metrics:
            raise ConfigError(f"best_metric={name!r}: the validation returns {', '.join(metrics)}; give one of them")
        return name or next(iter(metrics), None)

    def _save(self, *, by_time: bool, is_final: bool) -> bool:
        """Save, or start to; return False where that has failed and the training goes on.

        Args:
            by_time: whether it came by time alone; it is removed after the next save, where all others are kept.
            is_final: whether the training is about to end, and cannot go on without it.
        """

        def write() -> PendingCheckpoint:
            metrics = {name: float(value) for name, value in self._told.items() if math.isfinite(value)}
            num_read = self._data.total_read(self._feed)
            return self._write(TrialState(type(self._trial).__qualname__, self._batch, num_read, self._best, metrics))

        is_temporary = by_time and self._schedule.retention is None and self._retention().newest is None
        return self._saves.save(self._batch, write, is_temporary=is_temporary, is_final=is_final)

    def _retention(self) -> Retention:
        schedule = self._schedule
        if schedule.retention is not None:
            return schedule.retention
        name = self._best_metric()
        if schedule.checkpoint_policy != "best" or name is None:
            return Retention()
        return Retention(2, best=f"val_{name}", best_is=schedule.best_is)


def _has_validation(metrics: Mapping[str, float] | None) -> bool:
    return any(name.startswith("val_") for name in metrics or ())
