"""The training loop: steps, evaluations, checkpoints."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pipekit.checkpoint.manifest import EMA, TrainingState, checkpoint_name, earlier_checkpoints
from pipekit.checkpoint.reader import CheckpointReader
from pipekit.checkpoint.retention import Retention
from pipekit.data.batch_loader import BatchLoader, MapDataset
from pipekit.data.order import SampleOrder
from pipekit.data.prefetch import Prefetcher
from pipekit.data.tokenizer import tokenizer_files
from pipekit.deepspeed.deepspeed_config import plan_deepspeed_config
from pipekit.distributed.processes import raise_together
from pipekit.engine.build import build_engine
from pipekit.engine.late_number import LateNumber
from pipekit.engine.load import load_checkpoint, load_initial_weights
from pipekit.engine.micro_batches import MicroBatch
from pipekit.engine.module import PipelineModule
from pipekit.engine.save import PendingCheckpoint, SnapshotMemory, save_checkpoint
from pipekit.engine.stopwatch import Moment
from pipekit.engine.training_engine import TrainingEngine
from pipekit.errors import CheckpointError, DamagedCheckpointError, PipekitError
from pipekit.plan.plan import StartPoint
from pipekit.plan.run_folder import check_data
from pipekit.training.callbacks import Callback, RunResult, StepMetrics
from pipekit.training.ema import ema_weights, track_ema
from pipekit.training.layers_trial import LayersTrial
from pipekit.training.optimizer import takes_states_of
from pipekit.training.prepare import initial_weights
from pipekit.training.profile import save_profile

# A loss that stays infinite or not a number will not come back by itself.
_MAX_SKIPPED_IN_A_ROW = 20
# Beside the last step, one is drawn early, when everything has run a few times.
_PROFILED_STEP = 10


@dataclass(frozen=True)
class _LaunchedStep:
    """A step whose results may still be on their way from the device."""

    step: int
    lr: float
    num_tokens: int
    loss: LateNumber
    grad_norm: LateNumber
    started: Moment
    ended: Moment

    @property
    def has_ended(self) -> bool:
        return self.loss.is_here and self.grad_norm.is_here

    def read(self) -> StepMetrics:
        step_time_s = self.ended.since(self.started)
        return StepMetrics(
            step=self.step,
            loss=self.loss.read(),
            lr=self.lr,
            grad_norm=self.grad_norm.read(),
            tokens_per_s=self.num_tokens / step_time_s,
            step_time_s=step_time_s,
        )


class LayersTrainer:
    """Trains a trial as its context's plan says. Every rank builds one and calls `fit`.

    The loss and the gradient norm of a step that the device has not finished are read while the next one runs, so that
    the device need not wait for the host between them; or at once where an evaluation, a checkpoint or the end of the
    run follows.

    Args:
        trial: what to train.
        callbacks: called on the rank that reports.
    """

    def __init__(self, trial: LayersTrial, callbacks: Sequence[Callback] = ()) -> None:
        self.trial = trial
        self.context = trial.context
        self.config = self.context.config
        reports = self.context.mpu.should_report_metrics
        self._callbacks = [*callbacks, *trial.build_callbacks()] if reports else []
        self.engine = self._build_engine()
        if self.config.train.ema is not None:
            track_ema(self.engine.view.torch_optimizer, self.config.train.ema)
        self._train_loader = self._build_loader(trial.build_train_dataset, shuffle=self.config.data.shuffle)
        self._validation_loader = None
        if self.config.train.eval_interval is not None:
            self._validation_loader = self._build_loader(trial.build_validation_dataset, shuffle=False)
        self.step = 0
        self.consumed_samples = 0
        self._metrics = StepMetrics(step=0)
        self._skipped_in_a_row = 0
        self._snapshot_memory = SnapshotMemory() if self.config.checkpoint.is_async else None
        self._checkpoint: Path | None = None
        self._pending: PendingCheckpoint | None = None
        self._pending_step = 0

    def fit(self) -> RunResult:
        """Train until `train.steps` updates are made, from the checkpoint to go on from, if there is one.

        Raises:
            PipekitError: if training cannot go on; the callbacks are closed all the same.
        """
        with ExitStack() as stack:
            for callback in reversed(self._callbacks):
                stack.callback(callback.close)
            for loader in (self._train_loader, self._validation_loader):
                if loader is not None:
                    stack.callback(loader.close)
            stack.callback(self._settle_save)
            return self._fit()

    def _settle_save(self) -> None:
        """Let a checkpoint be written out when training fails."""
        if self._pending is not None:
            self._pending.settle(self.config.run.timeout_s)

    def _fit(self) -> RunResult:
        context, train = self.context, self.config.train
        self._checkpoint = context.start
        if context.plan.start is not None:
            self._resume(context.plan.start)
        elif source := initial_weights(self.config):
            context.mpu.activity.begin("start", f"loading {source.path}")
            load_initial_weights(self.engine, source)
        self._each(lambda callback: callback.on_train_start(context.plan, context.folder, self.step))
        started_s = time.perf_counter()
        first_val_loss = None
        if train.eval_interval is not None and self.step == 0:
            self._metrics = self._evaluate(StepMetrics(step=0))
            first_val_loss = self._metrics.val_loss
            self._each(lambda callback: callback.on_step_end(self._metrics))
        unread: _LaunchedStep | None = None
        while self.step < train.steps:
            try:
                launched = self._launch_step()
            finally:
                # Reported even where the step after it fails.
                if unread is not None:
                    self._end_step(unread.read())
                unread = None
            last = self.step == train.steps
            interval = self.config.checkpoint.interval
            evaluates = train.eval_interval is not None and (last or self.step % train.eval_interval == 0)
            draws = self.config.logging.profile and (last or self.step == _PROFILED_STEP)
            saves = last or (interval is not None and self.step % interval == 0)
            if not (launched.has_ended or evaluates or draws or saves or self._skipped_in_a_row):
                unread = launched
                continue
            metrics = launched.read()
            if evaluates:
                metrics = self._evaluate(metrics)
                first_val_loss = metrics.val_loss if first_val_loss is None else first_val_loss
            self._end_step(metrics)
            if draws:
                self._draw_profile()
            if saves:
                self._save()
        self._finish_save()
        result = RunResult(self.step, self._checkpoint, first_val_loss, self._metrics, time.perf_counter() - started_s)
        self._each(lambda callback: callback.on_train_end(result))
        return result

    def train_step(self) -> StepMetrics:
        """Make one update, on the next global batch, and wait for its metrics."""
        return self._launch_step().read()

    def _launch_step(self) -> _LaunchedStep:
        train, device = self.config.train, self.context.device
        self.context.mpu.activity.begin_step(self.step + 1)
        lr = self.trial.learning_rate(self.step)
        self.engine.set_lr(lr)
        started = Moment.now(device)
        following = self.consumed_samples + train.global_batch_size
        then = following if self.step + 1 < train.steps else None
        loss = self.engine.train_batch(self._batches(self._train_loader, self.consumed_samples, then))
        launched = _LaunchedStep(
            step=self.step + 1,
            lr=lr,
            num_tokens=train.global_batch_size * train.sequence_length,
            ended=Moment.now(device),
            loss=LateNumber(loss),
            grad_norm=self.engine.late_grad_norm,
            started=started,
        )
        self.step += 1
        self.consumed_samples = following
        if train.check_replicas is not None and self.step % train.check_replicas == 0:
            self.engine.check_replicas()
        return launched

    def _end_step(self, metrics: StepMetrics) -> None:
        """Report a step, and end the run where its gradient was one too many that was not finite."""
        self._metrics = metrics
        self._each(lambda callback: callback.on_step_end(metrics))
        # From the first on, each is read at once, so that the run ends with the step that the message names.
        self._skipped_in_a_row = 0 if math.isfinite(metrics.grad_norm or 0.0) else self._skipped_in_a_row + 1
        if self._skipped_in_a_row == _MAX_SKIPPED_IN_A_ROW:
            raise PipekitError(
                f"step {metrics.step}: the gradient has not been finite for {self._skipped_in_a_row} steps in a row "
                f"(loss {metrics.loss}), and none of them changed the weights; lower optimizer.lr="
                f"{self.config.optimizer.lr:g}, lengthen scheduler.warmup_steps, or train in bf16 or fp32"
            )

    def _draw_profile(self) -> None:
        timeline = self.engine.gather_timeline()
        if self.context.mpu.should_report_metrics:
            save_profile(timeline, self.context.folder.profile / f"step-{self.step:08d}")

    def _evaluate(self, metrics: StepMetrics) -> StepMetrics:
        """Return the metrics with the held-out loss added: the same batches every time, whatever the layout."""
        self._each(lambda callback: callback.on_evaluation_start(self.step))
        self.context.mpu.activity.begin(f"evaluation after step {self.step}", "preparing the evaluation")
        train = self.config.train
        extra_metrics = self.trial.validation_metrics()
        sums = dict.fromkeys(extra_metrics, 0.0)

        def observe(outputs: Any, labels: Any) -> None:
            for name, metric in extra_metrics.items():
                sums[name] += float(metric(outputs, labels))

        losses = []
        with ema_weights(self.engine) if train.eval_ema else nullcontext():
            for batch in range(train.eval_batches):
                then = (batch + 1) * train.global_batch_size if batch + 1 < train.eval_batches else None
                batches = self._batches(self._validation_loader, batch * train.global_batch_size, then)
                losses.append(float(self.engine.eval_batch(batches, observe=observe)))
        num_micro_batches = train.eval_batches * self.context.plan.batch.num_micro_batches
        extra = {f"val_{name}": self.context.reduce_mean(value / num_micro_batches) for name, value in sums.items()}
        return replace(metrics, val_loss=sum(losses) / len(losses), extra=extra or None)

    def _build_engine(self) -> TrainingEngine:
        plan, train, parallel = self.context.plan, self.config.train, self.config.parallel
        module = PipelineModule(
            self.context.specs,
            mpu=self.context.mpu,
            boundaries=plan.boundaries,
            loss_fn=self.trial.loss,
            base_seed=train.seed,
            activation_checkpoint_interval=int(train.activation_checkpointing),
            device=self.context.device,
            sequence_parallel=parallel.sequence_parallel,
            schedule=plan.schedule,
            compile_layers=train.compile,
        )
        return build_engine(
            module,
            deepspeed_config=plan_deepspeed_config(
                micro_batch_size=plan.batch.micro_batch_size,
                num_micro_batches=plan.batch.num_micro_batches,
                precision=plan.precision,
                zero=parallel.zero,
                gradient_clipping=train.gradient_clipping,
                extra=self.config.deepspeed,
                offload=parallel.offload,
                device=plan.device,
            ),
            build_optimizer=self.trial.build_optimizer,
            measure_costs=parallel.schedule == "auto",
            max_in_flight=parallel.max_in_flight,
            profile=self.config.logging.profile,
        )

    def _build_loader(self, build_dataset: Callable[[], MapDataset | None], *, shuffle: bool) -> Prefetcher | None:
        if not self.context.mpu.should_build_data_loader:
            return None
        dataset = build_dataset()
        if dataset is None:
            raise PipekitError(
                f"train.eval_interval={self.config.train.eval_interval}: {type(self.trial).__name__} has no validation "
                "data; set it to null, or return a dataset from build_validation_dataset"
            )
        if not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")):
            raise PipekitError(
                f"{type(self.trial).__name__}.{build_dataset.__name__} returned a {type(dataset).__name__}, which "
                "lacks __len__ or __getitem__; return a map-style dataset, or write a pipekit.Trial, which takes others"
            )
        batch = self.context.plan.batch
        loader = BatchLoader(
            dataset,
            SampleOrder(len(dataset), self.config.train.seed, shuffle=shuffle),
            global_batch_size=batch.global_batch_size,
            micro_batch_size=batch.micro_batch_size,
            dp_rank=self.context.mpu.data_parallel_rank,
            dp=batch.dp,
        )
        return Prefetcher(loader, pin_memory=self.context.device.type == "cuda")

    @staticmethod
    def _batches(loader: Prefetcher | None, consumed_samples: int, then: int | None) -> Iterator[MicroBatch] | None:
        return None if loader is None else iter(loader.step_batches(consumed_samples, then=then))

    def _resume(self, start: StartPoint) -> None:
        if start.warning:
            self._each(lambda callback: callback.on_warning(start.warning))
        training = self._load(start.checkpoint)
        self.step, self.consumed_samples = training.step, training.consumed_samples
        self._metrics = StepMetrics(step=training.step)

    def _load(self, checkpoint: Path) -> TrainingState:
        """Load a checkpoint or, where the run chose it itself and it is damaged, the newest before it that is whole."""
        self.context.mpu.activity.begin("start", f"loading {checkpoint.name}")
        try:
            reader, error = CheckpointReader(checkpoint), None
            check_data(reader.manifest, self.trial.data_fingerprint, where=reader.path)
        except CheckpointError as failure:
            error = failure
        try:
            raise_together(error)
            same_states = takes_states_of(reader.manifest.training.optimizer["type"], self.config.optimizer)
            without = () if self.config.train.ema is not None else (EMA,)
            return load_checkpoint(self.engine, reader, optimizer_states=same_states, without_states=without)
        except DamagedCheckpointError as damage:
            earlier = earlier_checkpoints(checkpoint) if self.config.checkpoint.resume == "auto" else []
            if not earlier:
                raise
            warning = f"{damage}; going on from {earlier[0]} instead"
        self._each(lambda callback: callback.on_warning(warning))
        return self._load(earlier[0])

    def _save(self) -> None:
        """Save a checkpoint, or begin to where that is done in the background, at most one at a time."""
        self._finish_save()
        name, settings = checkpoint_name(self.step), self.config.checkpoint
        self.context.mpu.activity.begin(f"checkpoint {name}", f"writing {name}")
        view = self.engine.view
        training = TrainingState(
            step=self.step,
            consumed_samples=self.consumed_samples,
            seed=self.config.train.seed,
            lr=self._metrics.lr or 0.0,
            optimizer={"type": self.config.optimizer.type, "step": view.step_count(), "states": view.state_names()},
            loss_scaler=view.loss_scaler_state(),
            data_fingerprint=self.trial.data_fingerprint,
            metrics={key: value for key, value in self._metrics.as_record().items() if math.isfinite(value)},
        )
        tokenizer = self.trial.tokenizer_file
        self._pending = save_checkpoint(
            self.engine,
            self.context.folder.checkpoints,
            training=training,
            config_yaml=self.config.to_yaml(),
            extra_files={} if tokenizer is None else tokenizer_files(tokenizer),
            retention=Retention(settings.keep, settings.keep_every, settings.keep_best, settings.best_is),
            name=name,
            background=self._snapshot_memory,
        )
        self._pending_step = self.step
        if self._snapshot_memory is None:
            self._finish_save()

    def _finish_save(self) -> None:
        """Wait until the last checkpoint is on the disk, and report it."""
        pending, step = self._pending, self._pending_step
        if pending is None:
            return
        if not pending.is_done:
            name = pending.path.name
            self.context.mpu.activity.begin(f"checkpoint {name}", f"waiting until {name} is written")
        self._pending = None
        self._checkpoint = pending.wait()
        self._each(lambda callback: callback.on_checkpoint(step, pending.path))

    def _each(self, call: Callable[[Callback], None]) -> None:
        self.context.mpu.activity.begin(f"callbacks after step {self.step}", "calling callbacks")
        for callback in self._callbacks:
            call(callback)
