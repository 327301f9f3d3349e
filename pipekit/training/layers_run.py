"""A run of layers as a trial: its engine, data and checkpoints, of a plan and the hooks of a `LayersTrial`."""

from __future__ import annotations

import math
import shlex
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from operator import mul
from pathlib import Path
from typing import Any

from pipekit.checkpoint.manifest import EMA, TrainingState, checkpoint_name
from pipekit.checkpoint.retention import Retention
from pipekit.config.callbacks_config import CallbacksConfig
from pipekit.config.growth import batch_size_at, sequence_length_at
from pipekit.config.trial_config import TrialConfig, TrialRunConfig
from pipekit.data.tokenizer import tokenizer_files
from pipekit.deepspeed.deepspeed_config import plan_deepspeed_config
from pipekit.distributed.host_folders import HostFolders
from pipekit.distributed.processes import gather_objects, run_together
from pipekit.distributed.rank_role import RankRole
from pipekit.engine.build import build_engine
from pipekit.engine.gather import gather_named
from pipekit.engine.late_number import LateNumber
from pipekit.engine.load import load_checkpoint, load_initial_adapters, load_initial_weights
from pipekit.engine.micro_batches import MicroBatch
from pipekit.engine.module import PipelineModule
from pipekit.engine.open_checkpoint import open_checkpoint
from pipekit.engine.save import PendingCheckpoint, SnapshotMemory, save_checkpoint
from pipekit.engine.stopwatch import Moment
from pipekit.engine.training_engine import TrainingEngine
from pipekit.files import late_limit_s
from pipekit.inference.base_weights import base_record
from pipekit.layers.layer_drop import LayerDrop
from pipekit.plan.run_folder import check_data
from pipekit.settings.duration import parse_duration
from pipekit.step_profile.window import ProfileWindow
from pipekit.training.context import TrialContext
from pipekit.training.ema import ema_weights, track_ema
from pipekit.training.evaluation import EvaluationStopped
from pipekit.training.late_metrics import LateMetrics, LaunchedStep
from pipekit.training.layers_trial import LayersTrial, Metric
from pipekit.training.loggers import MetricsFile, TensorBoardLogger, json_line
from pipekit.training.numbers_watch import NumbersWatch
from pipekit.training.optimizer import name_parameters, takes_states_of
from pipekit.training.periods import Batch
from pipekit.training.prepare import initial_adapters, initial_weights
from pipekit.training.run_data import RunData
from pipekit.training.run_totals import PeakMemory, RunTotals
from pipekit.training.shipped import build_shipped_callbacks
from pipekit.training.slow_ranks import StepTimes
from pipekit.training.trial import Trial
from pipekit.training.trial_callbacks import TrialCallback
from pipekit.training.trial_checkpoint import TrialState
from pipekit.training.trial_loop import TrialLoop, TrialResult, TrialSchedule

# Under this name its state is beside those of callbacks.
_WATCH = "numbers_watch"


class LayersRun(Trial):
    """The trial that `pipekit train` makes of a `LayersTrial`, as its context's plan says. Every rank builds one.

    The loss and the gradient norm of a step are the same on every rank, so that no rank waits for another to report
    them. Where the device has not finished a step, they are read while the next one runs, so that the device need not
    wait for the host; or at once where an evaluation, a checkpoint or the end of the run follows.

    Args:
        hooks: what gives the layers' loss, data and optimizer.

    Attributes:
        engine: the engine.
        data: the samples, and the position among them.
        base: record of the weights that adapters are added to; empty where the whole model is trained.
        watch: trains each step, and watches its numbers.
        step_times: finds slow ranks; None where there is one.
        totals: of what has been trained on.
        memory: peak memory of this rank.
        profile: measures the steps of a window; None where nothing is profiled.
        snapshot_memory: of checkpoints in the background; None where they are written at once.
    """

    def __init__(self, hooks: LayersTrial) -> None:
        self.hooks, self.run = hooks, hooks.context
        self.config = config = self.run.config
        mpu = self.run.mpu
        settings = TrialConfig(
            seed=config.train.seed,
            run=TrialRunConfig(dir=config.run.dir, timeout_s=config.run.timeout_s, max_time=config.run.max_time),
            callbacks=CallbacksConfig(progress=False, tensorboard=config.logging.tensorboard, **dict(config.callbacks)),
        )
        super().__init__(TrialContext(settings, self.run.device))
        dp = self.run.plan.batch.dp
        self.context.set_mpu(RankRole(mpu.data_parallel_rank, dp, True, mpu.should_build_data_loader))
        self.engine: TrainingEngine = self.context.wrap_model_engine(self._build_engine())
        if config.train.ema is not None:
            track_ema(self.engine.view.torch_optimizer, config.train.ema)
        self.data = RunData(hooks)
        self.base: Mapping[str, str] = {}
        self.watch = NumbersWatch(self.engine, config, precision=self.run.plan.precision)
        self.step_times: StepTimes | None = None
        if self.run.plan.layout.world_size > 1:
            self.step_times = StepTimes(self.engine, interval=config.logging.interval, warn=self.watch.warn)
        self.totals = RunTotals(self.run.plan, self.run.device)
        self.memory = PeakMemory(self.run.device)
        self.profile: ProfileWindow | None = None
        if config.profile.steps:
            self.profile = ProfileWindow(
                self.engine,
                config.profile,
                folder=self.run.folder.profile,
                reports=mpu.should_report_metrics,
                matmul_format=self.run.plan.matmul_format,
            )
        self.hosts = HostFolders.find(self.run.folder.path) if config.checkpoint.storage == "local" else None
        self.snapshot_memory = SnapshotMemory() if config.checkpoint.is_async else None

    def fit(self, callbacks: Sequence[TrialCallback] = ()) -> TrialResult:
        """Train until `train.steps` updates are made, from the checkpoint to go on from, if there is one.

        Args:
            callbacks: called on the rank that reports, beside those of the hooks.

        Raises:
            PipekitError: if training cannot go on.
        """
        train, checkpoint, start = self.config.train, self.config.checkpoint, self.run.plan.start
        mpu = self.run.mpu
        here: list[TrialCallback] = [self.watch]
        if self._keeps_metrics():
            here = [MetricsFile(self.run.folder, self.context.warn), self.watch]
        if mpu.should_report_metrics:
            tensorboard = TensorBoardLogger(self.context, self.config.model_dump(mode="json"))
            here = [*callbacks, tensorboard, *self.hooks.build_callbacks(), self.watch]
        schedule = TrialSchedule(
            max_length=Batch(train.steps),
            reporting_period=Batch(1),
            validation_period=None if train.eval_interval is None else Batch(train.eval_interval),
            checkpoint_period=Batch(checkpoint.interval) if isinstance(checkpoint.interval, int) else None,
            save_every_s=parse_duration(checkpoint.interval) if isinstance(checkpoint.interval, str) else None,
            checkpoint_policy="none",
            step_zero_validation=True,
            evaluates=train.eval_interval is not None,
            on_save_error=checkpoint.on_error,
            retention=Retention(checkpoint.keep, checkpoint.keep_every, checkpoint.keep_best, checkpoint.best_is),
        )
        with ExitStack() as stack:
            stack.callback(self.data.close)
            shipped = run_together(lambda: build_shipped_callbacks(self, evaluates=schedule.evaluates))
            loop = LayersLoop(self, schedule, self.run.folder.checkpoints, shipped=shipped, here=here)
            adapts = self.config.lora.rank is not None
            if (start is None or adapts) and (source := initial_weights(self.config)):
                mpu.activity.begin("start", f"loading {source.path}")
                load_initial_weights(self.engine, source)
                self.base = base_record(source) if adapts else {}
            if start is not None:
                return loop.fit(start.checkpoint, tries_earlier=checkpoint.resume == "auto", warning=start.warning)
            if adapters := initial_adapters(self.config, self.run.specs):
                load_initial_adapters(self.engine, adapters)
            return loop.fit(None)

    def train_batch(self, dataloader_iter: Any, epoch_idx: int, batch_idx: int) -> LaunchedStep:
        """Launch one update, on the next global batch."""
        train, device, step = self.config.train, self.run.device, batch_idx + 1
        lr = self.hooks.learning_rate(batch_idx)
        self.engine.set_lr(lr, self.hooks.momentum(batch_idx))
        started = Moment.now(device)
        first = self.data.consumed_samples
        batch_size, length = batch_size_at(train, first), sequence_length_at(train, step)
        following = first + batch_size
        then = following if step < train.steps else None
        if train.batch_warmup is not None and batch_size != self.engine.train_batch_size():
            self.engine.set_train_batch_size(batch_size)
        self.data.waited_s = 0.0
        with ExitStack() as stack:
            if self.step_times is not None:
                stack.enter_context(self.step_times.timing(step))
            if self.profile is not None:
                stack.enter_context(self.profile.measuring(step))
            loss = self.watch.train_batch(step, lambda: self._read(then, length), samples=range(first, following))
        launched = LaunchedStep(
            lr=lr,
            num_tokens=batch_size * length,
            ended=Moment.now(device),
            loss=LateNumber(loss),
            grad_norm=self.engine.late_grad_norm,
            started=started,
            waited_s=self.data.waited_s,
            totals=self.totals.add(batch_size, length),
            others=self.data.metrics(following)
            | self._group_rates(lr)
            | self._growth(batch_idx, batch_size, length)
            | ({} if self.step_times is None else self.step_times.metrics),
        )
        self.data.consumed_samples = following
        if train.check_replicas is not None and step % train.check_replicas == 0:
            self.engine.check_replicas()
        return launched

    def _group_rates(self, lr: float) -> dict[str, float]:
        """Learning rate of each of the optimizer's groups, where there are any."""
        if type(self.hooks).build_optimizer is LayersTrial.build_optimizer:
            # Groups of parameters that other ranks hold are told too.
            groups = self.config.optimizer.groups
            rates = {index: lr * (group.lr_scale or 1.0) for index, group in enumerate(groups) if not group.frozen}
        else:
            held = self.engine.view.param_groups
            rates = {index: float(group["lr"]) for index, group in enumerate(held)} if len(held) > 1 else {}
        return {f"lr_group{index}": rate for index, rate in rates.items()}

    def _growth(self, batch_idx: int, batch_size: int, length: int) -> dict[str, float]:
        """Sizes and probabilities that differ between steps, of the step after `batch_idx` others."""
        train, drop = self.config.train, self._layer_drop()
        return {
            **({} if train.batch_warmup is None else {"global_batch_size": batch_size}),
            **({} if train.curriculum is None else {"sequence_length": length}),
            **({} if drop is None else {"layer_drop_theta": drop.theta_at(batch_idx)}),
        }

    def _layer_drop(self) -> LayerDrop | None:
        drop = self.config.train.layer_drop
        return None if drop is None else LayerDrop(drop.theta, drop.gamma)

    def evaluate_full_dataset(self, data_loader: Any) -> dict[str, float]:
        """Return the held-out loss and the hooks' metrics over the same batches every time, under any layout."""
        train = self.config.train
        metrics = self.hooks.validation_metrics()
        with ema_weights(self.engine) if train.eval_ema else nullcontext():
            found = {name: self._evaluate(name, metrics) for name in self.data.validation_shares}
        shares = self.data.validation_shares
        means = {key: sum(shares[name] * found[name][key] for name in shares) for key in ("loss", *metrics)}
        return means | {f"{key}/{name}": values[key] for name, values in found.items() if name for key in values}

    def _evaluate(self, source: str, metrics: Mapping[str, Metric]) -> dict[str, float]:
        """Return the loss and the metrics over held-out samples of a source."""
        train = self.config.train
        losses, weights, sums = [], [], dict.fromkeys(metrics, 0.0)
        num_micro_batches = self.run.plan.batch.num_micro_batches

        def observe(outputs: Any, labels: Any) -> None:
            for name, metric in metrics.items():
                sums[name] += float(metric(outputs, labels))

        for batch in range(train.eval_batches):
            if batch and self.context.should_stop():
                raise EvaluationStopped
            batches = self.data.read_held_out(source, batch, is_last=batch + 1 == train.eval_batches)
            loss = self.engine.eval_batch(batches, num_micro_batches=num_micro_batches, observe=observe)
            losses.append(float(loss))
            total = self.engine.executor.total_weight
            weights.append(self.run.reduce_mean(1.0 if total is None else float(total)))
        num_outputs = train.eval_batches * num_micro_batches
        means = {name: self.run.reduce_mean(value / num_outputs) for name, value in sums.items()}
        # Where none counts, the mean is of nothing.
        mean = sum(map(mul, losses, weights)) / (sum(weights) or math.nan)
        return {"loss": mean, **means}

    def _keeps_metrics(self) -> bool:
        """True if this rank writes metrics on a host that has a run folder of its own and not the rank that reports."""
        reporting = gather_objects(self.run.mpu.should_report_metrics)
        hosts = self.hosts
        return hosts is not None and hosts.leads and not any(reporting[rank] for rank in hosts.ranks[hosts.own])

    def _build_engine(self) -> TrainingEngine:
        plan, train, parallel = self.run.plan, self.config.train, self.config.parallel
        deepspeed_config = plan_deepspeed_config(
            micro_batch_size=plan.batch.micro_batch_size,
            num_micro_batches=plan.batch.num_micro_batches,
            precision=plan.precision,
            zero=parallel.zero,
            gradient_clipping=train.gradient_clipping,
            extra=self.config.deepspeed,
            offload=parallel.offload,
            nvme_dir=parallel.nvme_dir,
            device=plan.device,
        )
        module = PipelineModule(
            self.run.specs,
            mpu=self.run.mpu,
            boundaries=plan.boundaries,
            loss_fn=self.hooks.loss,
            loss_weight=self.hooks.loss_weight,
            base_seed=train.seed,
            checkpointing=train.activation_checkpointing,
            device=self.run.device,
            sequence_parallel=parallel.sequence_parallel,
            # By its name, it is planned for each number of micro-batches.
            schedule=plan.schedule if train.batch_warmup is None else parallel.schedule,
            compile_layers=train.compile,
            layer_drop=self._layer_drop(),
            deepspeed_config=deepspeed_config,
        )
        name_parameters((name, parameter) for name, parameter, _ in module.named_logical_parameters())
        return build_engine(
            module,
            deepspeed_config=deepspeed_config,
            build_optimizer=self.hooks.build_optimizer,
            measure_costs=parallel.schedule == "auto",
            max_in_flight=parallel.max_in_flight,
        )

    def _read(self, then: int | None, length: int) -> Iterator[MicroBatch] | None:
        if self.step_times is None:
            return self.data.read(then, length=length)
        return self.step_times.read(lambda: self.data.read(then, length=length))


class LayersLoop(TrialLoop):
    """The loop of a run of layers, whose metrics need no gathering, and whose checkpoints are those of its engine."""

    _trial: LayersRun
    _unit = "step"
    _peaks: Sequence[int] = ()
    _save_s = 0.0

    def _how_to_go_on(self) -> str:
        return f"to go on: pipekit train {shlex.quote(str(self._trial.run.folder.config))}"

    def _how_to_save_faster(self) -> str:
        background = "" if self._trial.config.checkpoint.is_async else "set checkpoint.async=true, or "
        return f"{background}give a longer checkpoint.interval or a run.dir on a faster disk"

    def _build_metrics(self) -> LateMetrics:
        return LateMetrics(self._context, self._trial.watch, self._facts)

    def _measure(self) -> int:
        return self._trial.memory.measure()

    def _facts(self) -> dict[str, float]:
        """Metrics of what is known by now beside the step: peak memory, and the time of a save since the last step."""
        peaks, self._peaks = self._peaks, ()
        largest = max((self._requests.largest, *peaks))
        stood_s, self._save_s = self._save_s, 0.0
        return {
            **({"peak_memory_bytes": largest} if largest else {}),
            **(self._trial.memory.metrics(peaks) if peaks else {}),
            **({"save_time_s": stood_s} if stood_s else {}),
        }

    def _meet(self) -> bool:
        everyones = gather_objects((self._context.get_stop_requested(), self._measure()))
        self._peaks = [peak for _, peak in everyones]
        return any(stops for stops, _ in everyones)

    def _validate(self) -> bool:
        started_s = time.perf_counter()
        is_best = super()._validate()
        self._told["eval_time_s"] = time.perf_counter() - started_s
        return is_best

    def _save(self, *, by_time: bool, is_final: bool) -> bool:
        started_s = time.perf_counter()
        is_saved = super()._save(by_time=by_time, is_final=is_final)
        self._save_s += time.perf_counter() - started_s
        return is_saved

    def _train_batch(self, epoch: int) -> None:
        # Its draws are seeded by what is drawn, not by the batch.
        self._metrics.update(self._trial.train_batch(None, epoch, self._batch), 0)
        self._tell_of_numbers()
        profile = self._trial.profile
        if profile is not None and (text := profile.take_text()) is not None:
            self._callbacks.call("on_profile", text)

    def _tell(self, *, reports: bool, validates: bool) -> bool:
        is_best = super()._tell(reports=reports, validates=validates)
        self._tell_of_numbers()
        return is_best

    def _tell_of_numbers(self) -> None:
        """Tell of what the watch has found, and write its spikes down."""
        watch, folder = self._trial.watch, self._trial.run.folder
        spikes = watch.take_spikes()
        if spikes and self._trial.run.mpu.should_report_metrics:
            with folder.spikes.open("a", encoding="utf-8") as file:
                file.writelines(json_line(vars(spike)) for spike in spikes)
        for warning in watch.take_warnings():
            self._callbacks.call("on_warning", warning)

    def _goes_back(self) -> bool:
        """Go back to the last checkpoint because of a spike, and past its data; return whether there was one."""
        trial, spike = self._trial, self._trial.watch.spike
        if spike is None:
            return False
        self._saves.finish()
        if self._saves.newest is None:
            trial.watch.spike = None
            self._callbacks.call("on_warning", f"step {spike.step}: there is no checkpoint to go back to; going on")
            return False
        # The next step may have been launched by now.
        self._has_unread, self._metrics = False, self._build_metrics()
        self._batch = self._callbacks.batch = self._load(self._saves.newest, tries_earlier=True).batch
        trial.watch.count_rollback(spike, self._batch)
        first = trial.data.consumed_samples
        trial.data.skip_to(self._batch, spike.end)
        self._callbacks.call("on_rollback", self._batch)
        self._callbacks.call(
            "on_warning", f"going on from {self._saves.newest}, past the samples {first} to {spike.end - 1}"
        )
        return True

    def _write(self, state: TrialState) -> PendingCheckpoint:
        """Save the engine, or start to if saves run in the background."""
        trial, view, metrics = self._trial, self._trial.engine.view, state.metrics or {}
        training = TrainingState(
            step=state.batch,
            consumed_samples=trial.data.consumed_samples,
            seed=trial.config.train.seed,
            lr=metrics.get("lr", 0.0),
            optimizer={"type": trial.config.optimizer.type, "step": view.step_count(), "states": view.state_names()},
            loss_scaler=view.loss_scaler_state(),
            data_fingerprint=trial.hooks.data_fingerprint,
            metrics={"step": state.batch, **metrics},
            mixture=trial.data.state(),
            callbacks=self._callbacks.state_dict() | {_WATCH: trial.watch.state_dict()},
            base=trial.base,
        )
        tokenizer = trial.hooks.tokenizer_file
        return save_checkpoint(
            trial.engine,
            self._checkpoints,
            training=training,
            config_yaml=trial.config.to_yaml(),
            extra_files={} if tokenizer is None else tokenizer_files(tokenizer),
            retention=self._retention(),
            name=checkpoint_name(state.batch),
            background=trial.snapshot_memory,
            hosts=trial.hosts,
        )

    def _read(self, checkpoint: Path) -> TrialState:
        trial, config = self._trial, self._trial.config
        if trial.hosts is not None and len(trial.hosts.ranks) > 1:
            gather_named(checkpoint, trial.hosts, verify=False)

        reader = open_checkpoint(checkpoint.parent, lambda: checkpoint, limit_s=late_limit_s(config.run.timeout_s))
        assert reader is not None
        run_together(lambda: check_data(reader.manifest, trial.hooks.data_fingerprint, where=reader.path))
        training = load_checkpoint(
            trial.engine,
            reader,
            optimizer_states=takes_states_of(reader.manifest.training.optimizer["type"], config.optimizer),
            without_states=() if config.train.ema is not None else (EMA,),
        )
        self._callbacks.load_state_dict(training.callbacks)
        trial.data.go_on(training.step, training.consumed_samples, training.mixture)
        trial.totals.go_on(training.step, training.metrics)
        trial.watch.load_state_dict(training.callbacks.get(_WATCH, {}), training.step)
        return TrialState("", training.step, metrics=dict(training.metrics))
