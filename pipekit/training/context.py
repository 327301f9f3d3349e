"""Trial contexts: a rank's view of the settings, engines, ranks and progress of a trial."""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import torch
import torch.distributed as dist

from pipekit.config.trial_config import TrialConfig, parse_trial_config
from pipekit.distributed.processes import join_alone
from pipekit.distributed.rank_role import RankRole, role_of
from pipekit.engine.base_engine import BaseEngine
from pipekit.engine.training_engine import TrainingEngine
from pipekit.errors import ConfigError, PipekitError
from pipekit.hangs.activity import Activity
from pipekit.plan.run_folder import RunFolder
from pipekit.settings.duration import parse_duration
from pipekit.settings.suggest import closest
from pipekit.tensors.nested import map_tensors
from pipekit.training.gather_metrics import gather_metrics
from pipekit.training.periods import Pace
from pipekit.training.reducers import MetricReducer, WrappedReducer, wrap_reducer


@dataclass(frozen=True)
class RankNumbers:
    """Rank, number of processes, and local rank of this process.

    Attributes:
        rank: the global rank.
        size: the number of processes.
        local_rank: rank among the processes of this machine.
    """

    rank: int
    size: int
    local_rank: int

    def get_rank(self) -> int:
        """Return `rank`."""
        return self.rank

    def get_size(self) -> int:
        """Return `size`."""
        return self.size

    def get_local_rank(self) -> int:
        """Return `local_rank`."""
        return self.local_rank


class TrialContext:
    """One rank's view of a trial: settings to read, and methods that register engines, ranks and metrics.

    The constructor seeds the generators of torch, numpy and `random` with the trial's seed, so a model that the trial's
    constructor builds is the same on every rank.

    Args:
        config: settings of the trial.
        device: device of this rank.
        local_rank: rank among the processes of this machine.

    Attributes:
        config: settings of the trial.
        device: device of this rank.
        folder: files of the run.
        distributed: rank, number of processes and local rank of this process.
        models: engines that the trial has wrapped, in the order of the calls.
        reducers: reducers that the trial has wrapped.
        profiler: torch's profiler, after a call of `set_profiler`.
    """

    def __init__(self, config: TrialConfig, device: torch.device, *, local_rank: int = 0) -> None:
        self.config = config
        self.device = device
        self.folder = RunFolder(config.run.dir)
        self._path = self.folder.path.absolute()
        self.distributed = RankNumbers(dist.get_rank(), dist.get_world_size(), local_rank)
        self.models: list[BaseEngine] = []
        self.reducers: list[WrappedReducer] = []
        self.profiler: Any = None
        self.accumulates_by_hand = False
        """True after `disable_auto_grad_accumulation`."""
        self.checks_loaders = True
        """False after `disable_dataset_reproducibility_checks`."""
        self._role: RankRole | None = None
        self._pace: Pace | None = None
        self._batch = self._initial_batch = 0
        self.num_trained_batches = 0
        """Batches trained so far, including those of earlier starts."""
        self.num_batches = 0
        """Batches of the whole training, once a trainer knows its length."""
        self.terminal: TextIO = sys.stdout
        """The stream that the user sees."""
        self.is_watched = False
        """True if a launcher of pipekit reads the heartbeats in the run folder's logs."""
        self.should_stop: Callable[[], bool] = lambda: False
        """True, on all ranks at the same call, once a signal or the clock of any rank asks for a stop. All ranks call
        this together, between batches."""
        self.started_s = time.monotonic()
        """Start time of the run, by `time.monotonic`; `run.max_time` counts from it."""
        self._stops = False
        self._logs_to_tensorboard = False
        self._writer: Any = None
        self.seed_generators(config.seed)

    @property
    def max_time_s(self) -> float | None:
        """Seconds after `started_s` by which the run must have saved and stopped; None sets no limit."""
        max_time = self.config.run.max_time
        return None if max_time is None else parse_duration(max_time)

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> TrialContext:
        """Make a context in a single process without a launcher, as in a notebook or under a debugger.

        If processes have already joined, they stay joined, and each makes a context.

        Args:
            config: settings as in a YAML file, such as `{"hyperparameters": {"lr": 0.1}, "run": {"device": "cpu"}}`.

        Raises:
            ConfigError: if the settings are wrong; it lists every mistake.
        """
        parsed = parse_trial_config(config)
        is_cpu = parsed.run.device == "cpu" or (parsed.run.device == "auto" and not torch.cuda.is_available())
        return cls(parsed, join_alone(device="cpu" if is_cpu else "cuda"))

    def seed_generators(self, seed: int) -> None:
        """Seed the global generators of torch, numpy and `random`."""
        # torch.manual_seed notes the stack of its caller for GPUs yet to be used, which takes a sixth of a millisecond.
        torch.default_generator.manual_seed(seed)
        if self.device.type == "cuda":
            torch.cuda.manual_seed(seed)
        np.random.seed(seed % 2**32)
        random.seed(seed)

    # Engines and ranks.

    def wrap_model_engine(self, engine: Any) -> Any:
        """Register an engine with the trainer, so that checkpoints hold it, and return it.

        Args:
            engine: the first result of `pipekit.initialize`. The engines of a trial must all be pipelines or all plain.
                Their micro-batch sizes and numbers must agree, unless the trial accumulates gradients by hand.

        Raises:
            PipekitError: if it is not an engine of pipekit, is wrapped already, or does not match the others.
        """
        if not isinstance(engine, BaseEngine):
            kind = f"{type(engine).__module__}.{type(engine).__name__}"
            raise PipekitError(
                f"wrap_model_engine: a {kind} is no engine of pipekit's; make it with pipekit.initialize(...), whose "
                "arguments are those of deepspeed.initialize"
            )
        if any(engine is other for other in self.models):
            raise PipekitError("wrap_model_engine: this engine is wrapped already; wrap each engine once")
        for other in self.models[:1]:
            if isinstance(engine, TrainingEngine) != isinstance(other, TrainingEngine):
                raise PipekitError(
                    "wrap_model_engine: one engine has a PipelineModule, which trains on batches, and another a plain "
                    "module, which trains on micro-batches; give both the same kind of module"
                )
            sizes = [_micro_batches(each) for each in (other, engine)]
            if sizes[0] != sizes[1] and not self.accumulates_by_hand:
                shown = [f"{number} micro-batches of {size}" for size, number in sizes]
                raise PipekitError(
                    f"wrap_model_engine: one engine takes {shown[0]} in a batch and another {shown[1]}; configure them "
                    "alike, or call context.disable_auto_grad_accumulation() first and step by hand"
                )
        self.models.append(engine)
        return engine

    def set_mpu(self, mpu: Any) -> None:
        """Set this rank's role: a `ModelParallelUnit`, a `RankRole`, or an object with the attributes of `RankRole`.

        Without this call, the role is that of the first engine if it is a pipeline; with a plain module every rank is a
        replica.

        Raises:
            PipekitError: if it is called twice, or an attribute is missing or has the wrong type.
        """
        if self._role is not None:
            raise PipekitError("set_mpu: called twice; call it once, with the unit that all engines share")
        self._role = role_of(mpu)

    @property
    def role(self) -> RankRole:
        """Role of this rank."""
        if self._role is not None:
            return self._role
        if self.use_pipeline_parallel:
            return role_of(self.models[0].mpu)
        return RankRole(self.distributed.rank, self.distributed.size, True, True)

    @property
    def activity(self) -> Activity:
        """Current activity of this rank, noted by its first engine and the trainer, for reports of hangs."""
        return self._first_engine().mpu.activity

    @property
    def use_pipeline_parallel(self) -> bool:
        """True if the engines have pipeline modules, whose `train_batch` trains on a whole batch."""
        return bool(self.models) and isinstance(self.models[0], TrainingEngine)

    def disable_auto_grad_accumulation(self) -> None:
        """Let the trial accumulate gradients by hand: `train_batch` is always called once per batch."""
        self.accumulates_by_hand = True

    def disable_dataset_reproducibility_checks(self) -> None:
        """Accept data loaders of any type, such as torch's, which the trial must shard and shuffle itself.

        A resumed run reads such a loader again from its beginning, up to the position where it resumes.
        """
        self.checks_loaders = False

    def wrap_reducer(
        self,
        reducer: MetricReducer | Callable[[list[Any]], Any],
        name: str | None = None,
        for_training: bool = True,
        for_validation: bool = True,
    ) -> Any:
        """Register a metric that a reducer, or a function, computes from the values of all ranks.

        Args:
            reducer: a `MetricReducer`, or a function of a flat list of all values, in rank order.
            name: name of the metric; None if the reducer returns a dict of metrics.
            for_training: whether to report it with the training metrics.
            for_validation: whether to report it with the validation metrics.

        Returns:
            The reducer. For a function it is a new reducer, whose `update(value)` adds a value.
        """
        wrapped = wrap_reducer(reducer, name, for_training, for_validation)
        self.reducers.append(wrapped)
        return wrapped.reducer

    def reset_reducers(self) -> None:
        """Reset all wrapped reducers."""
        for wrapped in self.reducers:
            wrapped.reducer.reset()

    def reduce_metrics(self, for_training: bool) -> dict[str, float]:
        """Return the metrics of the wrapped reducers for training or for validation. All ranks call this together."""
        chosen = [each for each in self.reducers if (each.for_training if for_training else each.for_validation)]
        return gather_metrics(chosen, reports=self.role.should_report_metrics)

    def to_device(self, data: Any) -> Any:
        """Move tensors, or tuples, lists and dicts of them, to this rank's device."""
        return map_tensors(lambda tensor: tensor.to(self.device, non_blocking=True), data)

    # Sizes.

    @property
    def train_micro_batch_size_per_gpu(self) -> int:
        """Samples in a micro-batch of the first engine."""
        return _micro_batches(self._first_engine())[0]

    def get_train_micro_batch_size_per_gpu(self) -> int:
        """Return `train_micro_batch_size_per_gpu`."""
        return self.train_micro_batch_size_per_gpu

    @property
    def num_micro_batches_per_slot(self) -> int:
        """Micro-batches per replica in a batch of the first engine."""
        return _micro_batches(self._first_engine())[1]

    def get_num_micro_batches_per_slot(self) -> int:
        """Return `num_micro_batches_per_slot`."""
        return self.num_micro_batches_per_slot

    def get_per_slot_batch_size(self) -> int:
        """Return the number of samples per replica in a batch."""
        return self.train_micro_batch_size_per_gpu * self.num_micro_batches_per_slot

    def get_global_batch_size(self) -> int:
        """Return the number of samples in a batch, over all replicas."""
        return self.get_per_slot_batch_size() * self.role.data_parallel_world_size

    def _first_engine(self) -> BaseEngine:
        if not self.models:
            raise PipekitError("the sizes of batches are those of the first engine; call wrap_model_engine before")
        return self.models[0]

    # Where the training stands.

    def begin_batch(self, batch: int, pace: Pace) -> None:
        """Set the number of the current batch."""
        self._batch, self._pace = batch, pace

    def end_batch(self) -> None:
        """Count the current batch as trained."""
        self.num_trained_batches = self._batch + 1

    def note_length(self, initial_batch: int, num_batches: int) -> None:
        """Set the number of batches that earlier starts of the run have trained, and that of the whole training."""
        self._initial_batch = self._batch = self.num_trained_batches = initial_batch
        self.num_batches = num_batches

    def get_initial_batch(self) -> int:
        """Return the number of batches that earlier starts of the run have trained."""
        return self._initial_batch

    def current_train_batch(self) -> int:
        """Return the number of the current batch, counted from 0 over all epochs."""
        return self._batch

    def current_train_epoch(self) -> int:
        """Return the epoch in which the current batch begins, counted from 0."""
        return self._pace.epoch_of(self._batch) if self._pace else 0

    def is_epoch_start(self) -> bool:
        """True if the current batch is the first of its epoch."""
        return self._batch == 0 or self._epoch_changes(self._batch)

    def is_epoch_end(self) -> bool:
        """True if the current batch is the last of its epoch."""
        return self._epoch_changes(self._batch + 1)

    def _epoch_changes(self, batch: int) -> bool:
        pace = self._pace
        return pace is not None and pace.epoch_of(batch) > pace.epoch_of(batch - 1)

    def set_stop_requested(self, stop_requested: bool = True) -> None:
        """Ask on any rank to stop the training; it stops at the next report, validation or checkpoint."""
        self._stops = stop_requested

    def get_stop_requested(self) -> bool:
        """True if this rank has asked to stop the training."""
        return self._stops

    # Settings.

    def get_hparams(self) -> dict[str, Any]:
        """Return all hyperparameters."""
        return dict(self.config.hyperparameters)

    def get_hparam(self, name: str) -> Any:
        """Return a hyperparameter by name.

        Raises:
            ConfigError: if there is no hyperparameter of this name.
        """
        hparams = self.config.hyperparameters
        if name not in hparams:
            match = closest(name, hparams)
            hint = f"did you mean {match!r}?" if match else f"there are {', '.join(hparams) or 'none'}"
            raise ConfigError(f"hyperparameters.{name}: the trial asks for it, and it is not given; {hint}")
        return hparams[name]

    def get_data_config(self) -> dict[str, Any]:
        """Return the `data` section of the configuration."""
        return dict(self.config.data)

    def get_experiment_config(self) -> dict[str, Any]:
        """Return the whole configuration."""
        return self.config.model_dump(mode="json")

    def get_trial_seed(self) -> int:
        """Return the seed of the trial."""
        return self.config.seed

    def get_experiment_id(self) -> str:
        """Return the name of the folder that contains the run folder, such as `runs`."""
        return self._path.parent.name

    def get_trial_id(self) -> str:
        """Return the name of the run folder."""
        return self._path.name

    # Profiles and TensorBoard.

    def set_profiler(self, *args: Any, **options: Any) -> None:
        """Profile the training with `torch.profiler.profile`, which takes the arguments given here.

        The trainer starts the profiler and calls its `step` after every batch. Traces go to the run's `profile` folder;
        each, `rank-<rank>-<step>.json`, opens in Perfetto (ui.perfetto.dev) and in chrome://tracing.
        """
        options.setdefault("on_trace_ready", self._save_trace)
        self.profiler = torch.profiler.profile(*args, **options)

    def _save_trace(self, profiler: Any) -> None:
        self.folder.profile.mkdir(parents=True, exist_ok=True)
        name = f"rank-{self.distributed.rank}-{profiler.step_num}.json"
        profiler.export_chrome_trace(str(self.folder.profile / name))

    def set_enable_tensorboard_logging(self, enable_tensorboard_logging: bool) -> None:
        """Turn TensorBoard on or off. If it is on, the trainer writes all metrics to it. It is off by default."""
        self._logs_to_tensorboard = enable_tensorboard_logging

    def get_enable_tensorboard_logging(self) -> bool:
        """True if the trainer writes all metrics to TensorBoard."""
        return self._logs_to_tensorboard

    def get_tensorboard_path(self) -> Path:
        """Return the folder of this rank's event files: the run's for rank 0, a subfolder of it for other ranks."""
        rank = self.distributed.rank
        return self.folder.tensorboard / f"rank-{rank}" if rank else self.folder.tensorboard

    def get_tensorboard_writer(self) -> Any:
        """Return this rank's TensorBoard `SummaryWriter`, the same one at every call.

        Raises:
            ConfigError: if tensorboard is not installed.
        """
        if self._writer is None:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                raise ConfigError(
                    "get_tensorboard_writer: tensorboard is not installed; run pip install 'pipekit[tensorboard]'"
                ) from None
            # What was logged after the checkpoint that this start goes on from is logged again.
            purge_step = self._initial_batch + 1 if self._initial_batch else None
            self._writer = SummaryWriter(str(self.get_tensorboard_path()), purge_step=purge_step)
        return self._writer

    def warn(self, message: str) -> None:
        """Show a warning on the terminal."""
        self.terminal.write(f"warning: {message}\n")
        self.terminal.flush()

    def close(self) -> None:
        """Close the TensorBoard writer, if there is one."""
        writer, self._writer = self._writer, None
        if writer is not None:
            with suppress(OSError):  # the disk is full, as has been told
                writer.close()


def _micro_batches(engine: Any) -> tuple[int, int]:
    """Samples of a micro-batch, and micro-batches of each replica in a batch."""
    return int(engine.train_micro_batch_size_per_gpu()), int(engine.gradient_accumulation_steps())
