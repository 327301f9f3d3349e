"""The training loop of a trial: batches, reports, validations and checkpoints, each exactly when it is due."""

from __future__ import annotations

import contextlib
import logging
import math
import time
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal

import torch.distributed as dist

from pipekit.checkpoint.retention import Retention
from pipekit.distributed.processes import raise_together, run_together
from pipekit.distributed.rank_role import RankRole, check_roles
from pipekit.engine.plain_engine import PlainEngine
from pipekit.errors import ConfigError, PipekitError
from pipekit.plan.run_folder import RunFolder, trim_metrics
from pipekit.rng import fold_seed
from pipekit.training.callbacks import json_line
from pipekit.training.context import TrialContext
from pipekit.training.evaluation import evaluate
from pipekit.training.periods import Pace, Period
from pipekit.training.reducers import Reducer
from pipekit.training.trial import Trial, has_evaluation, metrics_of
from pipekit.training.trial_callbacks import Callbacks
from pipekit.training.trial_checkpoint import TrialState, find_checkpoint, load_trial_state, save_trial
from pipekit.training.trial_data import Feed, TrialData
from pipekit.training.trial_metrics import TrialMetrics

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrialSchedule:
    """Schedule of a training: the arguments of `Trainer.fit` of these names.

    Attributes:
        most_evaluations: batches of a validation at most; None evaluates all.
    """

    max_length: Period
    reporting_period: Period
    validation_period: Period | None
    checkpoint_period: Period | None
    checkpoint_policy: Literal["all", "best", "none"]
    best_metric: str | None
    best_is: Literal["lowest", "highest"]
    retention: Retention | None
    most_evaluations: int | None

    def __str__(self) -> str:
        return ", ".join(f"{name}={value}" for name, value in vars(self).items())

    @property
    def periods(self) -> list[Period]:
        """All periods that there are."""
        return [value for value in vars(self).values() if isinstance(value, Period)]


@dataclass(frozen=True)
class TrialResult:
    """End of a training.

    Attributes:
        batch: batches trained in all.
        checkpoint: the newest; None where none was written.
        metrics: the last training metrics that were reported.
        validation_metrics: the last; None where nothing was evaluated.
        time_s: wall time of this start.
    """

    batch: int
    checkpoint: Path | None
    metrics: dict[str, Any] | None
    validation_metrics: dict[str, Any] | None
    time_s: float


class TrialLoop:
    """One training of a trial, from its checkpoint to its end. All ranks make one together, and call `fit`.

    Args:
        trial: what to train.
        schedule: what is done when.
        folder: the files of the run.

    Raises:
        PipekitError: on every rank, if the roles, the callbacks or the loaders of the trial are wrong.
    """

    def __init__(self, trial: Trial, schedule: TrialSchedule, folder: RunFolder) -> None:
        self._trial, self._schedule, self._folder = trial, schedule, folder
        self._context: TrialContext = trial.context
        self._compare_ranks()
        self._callbacks = Callbacks(run_together(trial.build_callbacks))
        self._data = TrialData(trial, self._context)
        self._pace = self._find_pace()
        self._last = run_together(schedule.max_length.in_batches, self._pace)
        takes_batches = self._context.use_pipeline_parallel or self._context.accumulates_by_hand
        self._calls = 1 if takes_batches else self._context.num_micro_batches_per_slot
        self._metrics = TrialMetrics(self._context, "train_batch", Reducer.AVG, for_training=True)
        self._feed: Feed | None = None
        self._batch = 0
        self._reported = self._validated = self._saved = -1
        self._best: float | None = None
        self._checkpoint: Path | None = None
        self._training_metrics: dict[str, Any] | None = None
        self._validation_metrics: dict[str, Any] | None = None

    def _compare_ranks(self) -> None:
        """Check that the roles of all ranks fit together, and that all have the same schedule."""
        mine: tuple[RankRole, str] = self._context.role, str(self._schedule)
        everyones = [mine] * self._context.distributed.size
        dist.all_gather_object(everyones, mine)
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

    def fit(self, latest_checkpoint: str | Path | None, *, step_zero_validation: bool) -> TrialResult:
        """Train to the end; see `Trainer.fit`."""
        started_s = time.perf_counter()
        has_failed = True
        try:
            self._begin(latest_checkpoint)
            profiler = self._context.profiler
            with contextlib.nullcontext() if profiler is None else profiler:
                self._train(step_zero_validation)
            has_failed = False
        finally:
            # Ends the processes that read data.
            self._feed = None
            self._context.close()
            self._callbacks.shut_down(has_failed=has_failed)
        time_s = time.perf_counter() - started_s
        return TrialResult(self._batch, self._checkpoint, self._training_metrics, self._validation_metrics, time_s)

    def _begin(self, latest_checkpoint: str | Path | None) -> None:
        """Load the checkpoint to go on from, if there is one, and begin to read data where it stands."""
        is_first = self._context.distributed.rank == 0
        found = [
            run_together(lambda: find_checkpoint(latest_checkpoint, self._folder.checkpoints) if is_first else None)
        ]
        dist.broadcast_object_list(found, src=0)
        state = TrialState("")
        if found[0] is not None:
            self._checkpoint, state = load_trial_state(
                self._trial, self._callbacks, found[0], tries_earlier=latest_checkpoint is None
            )
            self._batch, self._best = state.batch, state.best
            self._reported = self._saved = self._batch
            self._validated = self._batch if state.metrics else -1
        num_read = run_together(self._data.own_read, state.micro_batches)
        self._feed = run_together(self._data.training_feed, num_read)
        run_together(lambda: trim_metrics(self._folder.metrics, self._batch) if is_first else None)
        self._context.note_initial_batch(self._batch)
        self._callbacks.call("on_trial_startup", self._batch, self._checkpoint and self._checkpoint.name)

    def _train(self, step_zero_validation: bool) -> None:
        schedule, pace, context, callbacks = self._schedule, self._pace, self._context, self._callbacks
        evaluates = has_evaluation(self._trial)
        if step_zero_validation and evaluates and self._batch == 0:
            self._validate()
        first = self._batch
        if first < self._last:
            callbacks.call("on_training_start")
        while self._batch < self._last:
            context.begin_batch(self._batch, pace)
            epoch = context.current_train_epoch()
            if self._batch == first or context.is_epoch_start():
                callbacks.call("on_training_epoch_start", epoch)
            self._train_batch(epoch)
            self._batch += 1
            if context.profiler is not None:
                context.profiler.step()
            if context.is_epoch_end():
                callbacks.call("on_training_epoch_end", epoch)
            is_last = self._batch == self._last
            reports = is_last or schedule.reporting_period.is_due(self._batch, pace)
            validates = evaluates and (is_last or self._is_due(schedule.validation_period))
            saves = is_last or self._is_due(schedule.checkpoint_period)
            # After the first batch, too, so that most mistakes of a trial are told at once.
            if not (reports or validates or saves or self._batch == first + 1):
                continue
            stops = self._meet()
            if reports or stops:
                self._report()
            is_best = validates and self._validate()
            policy = schedule.checkpoint_policy
            if saves or stops or (validates and policy == "all") or (is_best and policy == "best"):
                self._save()
            if stops:
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
        everyones = [False] * self._context.distributed.size
        dist.all_gather_object(everyones, self._context.get_stop_requested())
        return any(everyones)

    def _report(self) -> None:
        if self._reported == self._batch:
            return
        self._reported = self._batch
        self._training_metrics, batches = self._metrics.report()
        self._record(self._training_metrics)
        self._callbacks.call("on_training_workload_end", self._training_metrics, batches)

    def _validate(self) -> bool:
        """Validate, and return whether the metric by which checkpoints are compared is better than ever before."""
        schedule = self._schedule
        metrics = evaluate(self._trial, self._data, self._callbacks, most_batches=schedule.most_evaluations)
        self._validated, self._validation_metrics = self._batch, metrics
        self._record({f"val_{name}": value for name, value in metrics.items()})
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

    def _save(self) -> None:
        if self._saved == self._batch:
            return
        self._saved = self._batch
        metrics = self._validation_metrics if self._validated == self._batch else None
        state = TrialState(
            type(self._trial).__qualname__,
            self._batch,
            self._data.total_read(self._feed),
            self._best,
            {f"val_{name}": float(value) for name, value in (metrics or {}).items() if math.isfinite(value)},
        )
        self._checkpoint = save_trial(
            self._trial,
            self._callbacks,
            state,
            self._folder.checkpoints,
            num_samples=self._batch * self._pace.samples,
            retention=self._retention(),
        )

    def _retention(self) -> Retention:
        schedule = self._schedule
        if schedule.retention is not None:
            return schedule.retention
        name = self._best_metric()
        if schedule.checkpoint_policy != "best" or name is None:
            return Retention()
        return Retention(2, best=f"val_{name}", best_is=schedule.best_is)

    def _record(self, metrics: dict[str, Any]) -> None:
        """Write metrics to `metrics.jsonl`, the log and, where that is asked for, to TensorBoard, on the first rank."""
        context = self._context
        if context.distributed.rank != 0:
            return
        self._folder.path.mkdir(parents=True, exist_ok=True)
        with self._folder.metrics.open("a", encoding="utf-8") as file:
            file.write(json_line({"step": self._batch, **metrics}))
        _logger.info("batch %d: %s", self._batch, ", ".join(f"{name} {value:.6g}" for name, value in metrics.items()))
        if context.get_enable_tensorboard_logging():
            for name, value in metrics.items():
                context.get_tensorboard_writer().add_scalar(name, value, self._batch)
