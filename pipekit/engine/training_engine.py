"""Evaluation, data, losses and checkpoints of both engines, with a pipeline and without."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import torch
import torch.distributed as dist
from deepspeed.runtime.config import DeepSpeedConfig
from torch import Tensor, nn

from pipekit.data.batch_loader import BatchLoader, MapDataset
from pipekit.data.order import SampleOrder
from pipekit.data.prefetch import Prefetcher
from pipekit.deepspeed.cpu_adam import offloads_optimizer, with_cpu_adam
from pipekit.deepspeed.optimizers import view_optimizer
from pipekit.deepspeed.patches import clean_globals, drop_process_groups, import_muon_uncompiled, use_joined_processes
from pipekit.engine.channels import wait
from pipekit.engine.consistency_check import check_consistency
from pipekit.engine.diagnostics import Diagnostics
from pipekit.engine.executor import Executor, Observer
from pipekit.engine.late_number import LateNumber
from pipekit.engine.micro_batches import BatchFunction, TrainingData, join_batches
from pipekit.engine.module import PipelineModule
from pipekit.engine.stopwatch import Stopwatch
from pipekit.errors import ConfigError, PipekitError
from pipekit.schedules import Costs, Schedule, Timeline, plan_forward_only, plan_schedule
from pipekit.tensor_parallel import whole_outputs
from pipekit.tensors.host_memory import keep_freed_memory
from pipekit.tensors.nested import flatten, unflatten

OptimizerBuilder = Callable[[list[nn.Parameter]], torch.optim.Optimizer]

GradientOf = Callable[[nn.Parameter], Tensor | None]
"""Returns the gradient of a parameter; None where it has none. All data-parallel ranks call it together."""

GradientObserver = Callable[[GradientOf], None]


class TrainingEngine:
    """The part of an engine that does not depend on how gradients are reduced and weights are updated.

    It stands before one of DeepSpeed's engines among the bases of a class.

    Args:
        module: this rank's stages, and the schedule to run.
        deepspeed_config: DeepSpeed's configuration.
        build_optimizer: called with the trainable parameters; returns a torch optimizer. None where the configuration
            or `deepspeed_args` name one.
        measure_costs: whether to time the actions of the first steps, and then to plan the table anew for them.
        max_in_flight: the stage activations that a rank may hold under the table that is planned anew.
        profile: whether to time every step's actions, for `gather_timeline`.
        **deepspeed_args: further arguments of DeepSpeed's engine.
    """

    # Set by DeepSpeed's engine.
    module: PipelineModule
    device: torch.device
    optimizer: Any
    lr_scheduler: Any
    config: Any
    global_steps: int
    global_samples: int
    micro_batches: int
    micro_batch_size: int
    training_dataloader: Any
    data_iterator: Iterator[Any] | None
    steps_per_print: Callable[[], int | None]
    train_batch_size: Callable[[], int]
    set_dataiterator: Callable[[Iterator[Any] | None], None]
    _config: Any
    _global_grad_norm: Any

    _is_destroyed = False

    on_gradients: GradientObserver | None = None
    """Called before every update, when the gradients are those of the step and of all replicas, with a function of a
    parameter that returns its gradient in fp32 or the parameter's own type; of a tensor that tensor-parallel ranks
    shard, this rank's shard. In fp16 the gradients are multiplied by `view.loss_scale`."""

    def __init__(
        self,
        module: PipelineModule,
        *,
        deepspeed_config: Mapping[str, Any],
        build_optimizer: OptimizerBuilder | None = None,
        measure_costs: bool = False,
        max_in_flight: int | None = None,
        profile: bool = False,
        **deepspeed_args: Any,
    ) -> None:
        mpu = module.mpu()
        config = dict(deepspeed_config)
        parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
        device = next(iter(parameters), torch.empty(0)).device
        if device.type == "cpu":
            keep_freed_memory()
        optimizer = build_optimizer(parameters) if build_optimizer is not None else None
        if optimizer is not None and offloads_optimizer(config):
            optimizer = with_cpu_adam(optimizer)
        use_joined_processes()
        import_muon_uncompiled()
        with clean_globals():
            super().__init__(  # type: ignore[call-arg]
                # Unless told, DeepSpeed takes the local rank for the number of the GPU.
                args=SimpleNamespace(device_rank=device.index or 0),
                model=module,
                mpu=module._grid,
                config=config,
                config_class=DeepSpeedConfig(config, module._grid),
                **{"optimizer": optimizer, "model_parameters": parameters, **deepspeed_args},
            )
        self.mpu = mpu
        mpu.register_engine()
        self.view = view_optimizer(self.optimizer, mpu)
        self.executor = self._build_executor()
        self._measure_costs = measure_costs and mpu.layout.pp > 1
        self._max_in_flight = max_in_flight
        self._profile = profile
        if profile or self._measure_costs:
            self.executor.stopwatch = Stopwatch(self.device)
        self._diagnostics = Diagnostics(self)
        self._costs: Costs | None = None
        self._schedules: dict[tuple[str, int], Schedule] = {}

    def _build_executor(self) -> Executor:
        raise NotImplementedError

    def train_batch(self, data_iter: Iterator[Any] | None = None) -> Tensor:
        """Train on one global batch.

        Args:
            data_iter: yields `num_micro_batches` pairs of inputs and labels; read on the first and the last stage. The
                training data that the engine was built with, unless given.

        Returns:
            The mean loss over the global batch before the update, in fp32, on every rank.
        """
        raise NotImplementedError

    def _begin_training(self, data_iter: Iterator[Any] | None) -> None:
        if not torch.is_grad_enabled():
            raise PipekitError("train_batch needs gradients; call it outside torch.no_grad(), or use eval_batch")
        if data_iter is not None:
            self.set_dataiterator(data_iter)
        self.module.train()

    @property
    def schedule(self) -> Schedule:
        """The table of a training step.

        Raises:
            ConfigError: if the module's schedule cannot run with so many micro-batches.
        """
        key = ("train", self.micro_batches)
        if key not in self._schedules:
            self._schedules[key] = self._plan_schedule()
        return self._schedules[key]

    def _plan_schedule(self) -> Schedule:
        schedule, pp = self.module.schedule, self.mpu.layout.pp
        if isinstance(schedule, Schedule) and self._costs is None:
            if schedule.num_micro_batches != self.micro_batches:
                raise ConfigError(
                    f"schedule {schedule.name} is for {schedule.num_micro_batches} micro-batches, and a step has "
                    f"{self.micro_batches} (gradient_accumulation_steps)"
                )
            return schedule
        return plan_schedule(
            schedule.name if isinstance(schedule, Schedule) else schedule,
            pp=pp,
            num_micro_batches=self.micro_batches,
            stages_per_rank=self.mpu.num_stages // pp,
            costs=self._costs,
            max_in_flight=self._max_in_flight,
        )

    def _evaluation_schedule(self, num_micro_batches: int) -> Schedule:
        key = ("eval", num_micro_batches)
        if key not in self._schedules:
            self._schedules[key] = plan_forward_only(
                num_stages=self.mpu.num_stages, num_micro_batches=num_micro_batches, placement=self.mpu.placement
            )
        return self._schedules[key]

    def set_batch_fn(self, fn: BatchFunction) -> None:
        """Set the function that makes a pair of inputs and labels from what a data iterator yields."""
        self.executor.reader.batch_fn = fn

    def set_training_data(self, dataset: MapDataset, collate: Callable[[list[Any]], Any] | None = None) -> None:
        """Train on a dataset where `train_batch` is given no iterator: shuffled, every sample once an epoch.

        The order follows from the module's seed, and the position is `global_samples`, which checkpoints hold.

        Args:
            dataset: map-style; its samples are pairs of inputs and labels.
            collate: makes a micro-batch of a list of samples; stacks pairs of inputs and labels unless given.
        """
        loader = BatchLoader(
            dataset,
            SampleOrder(len(dataset), self.module.seed, shuffle=True),
            global_batch_size=self.train_batch_size(),
            micro_batch_size=self.micro_batch_size,
            dp_rank=self.mpu.data_parallel_rank,
            dp=self.mpu.layout.dp,
            collate=collate,
        )
        prefetcher = Prefetcher(loader, pin_memory=self.device.type == "cuda")
        data = TrainingData(prefetcher, lambda: int(self.global_samples))
        self.set_dataiterator(iter(data) if self.mpu.should_build_data_loader else None)
        self.training_dataloader = data

    def gather_timeline(self) -> Timeline:
        """Measured timeline of the last step on this pipeline. All ranks call this together.

        The engine must have been built with `profile=True`.
        """
        assert self.executor.stopwatch is not None, "the engine was built without profile=True"
        mine = tuple(self.executor.stopwatch.spans())
        spans: list[Any] = [mine]
        if self.mpu.layout.pp > 1:
            spans *= self.mpu.layout.pp
            dist.all_gather_object(spans, mine, group=self.mpu.pipe.process_group)
        return Timeline(self.schedule, tuple(spans))

    def eval_batch(
        self,
        data_iter: Iterator[Any] | None,
        return_logits: bool = False,
        compute_loss: bool = True,
        reduce_output: Literal["avg"] | None = "avg",
        bcast_loss: bool = True,
        num_micro_batches: int | None = None,
        *,
        observe: Observer | None = None,
    ) -> Any:
        """Return the mean loss of one global batch, in fp32, on every rank, without training on it.

        Args:
            data_iter: yields `num_micro_batches` pairs of inputs and labels; read on the first and the last stage.
            return_logits: whether to return a pair: the above, and the last layer's outputs for the whole batch on this
                pipeline, joined along their first dimension (None on ranks without the last stage).
            compute_loss: False takes the last layer's outputs in place of losses.
            reduce_output: None returns a list, one entry a micro-batch of this pipeline, in place of the mean.
            bcast_loss: whether ranks without the last stage return the losses too, rather than None.
            num_micro_batches: as many as in training, unless given.
            observe: called on the last stage with each micro-batch's outputs and labels.
        """
        self.module.eval()
        schedule = self._evaluation_schedule(num_micro_batches or self.micro_batches)
        collected: list[Any] = []

        def collect(outputs: Any, labels: Any) -> None:
            if return_logits or not compute_loss or observe is not None:
                outputs = whole_outputs(outputs)
            if return_logits or not compute_loss:
                collected.append(outputs)
            if observe is not None:
                observe(outputs, labels)

        loss_fn = self.module.loss_fn if compute_loss else _take_outputs
        with torch.no_grad():
            losses = self.executor.run(schedule, data_iter, loss_fn=loss_fn, observe=collect)
            if not compute_loss:
                result = self._mean_outputs(collected) if reduce_output else collected
            elif reduce_output:
                result = self._mean_loss(losses) if bcast_loss else self._mean_of_replicas(losses)
            else:
                result = self._spread(losses, schedule.num_micro_batches) if bcast_loss else losses
            if not (self.mpu.is_last_stage or (compute_loss and bcast_loss)):
                result = None
            if return_logits:
                return result, join_batches(collected)
        return result

    def _mean_outputs(self, outputs: list[Any]) -> Any:
        if not self.mpu.is_last_stage:
            return None
        tensors = [flatten(output, "the last layer's output")[0] for output in outputs]
        _, structure = flatten(outputs[0], "the last layer's output")
        means = [torch.stack([tensor.float() for tensor in parts]).mean(0) for parts in zip(*tensors, strict=True)]
        for mean in means:
            self._average_over_replicas(mean)
        return unflatten(means, structure)

    @property
    def grad_norm(self) -> float:
        """The 2-norm of the last step's gradient, before clipping; infinite where the step was skipped."""
        return self.late_grad_norm.read()

    @property
    def late_grad_norm(self) -> LateNumber:
        """`grad_norm`, to be read without waiting for what is launched meanwhile."""
        norm = self._global_grad_norm
        return LateNumber(float("nan") if norm is None else norm)

    def set_lr(self, lr: float) -> None:
        """Set the learning rate of the next step."""
        self.view.set_lr(lr)

    def _mean_loss(self, losses: list[Tensor]) -> Tensor:
        return self._broadcast_from_last(self._mean_of_replicas(losses))

    def _mean_of_replicas(self, losses: list[Tensor]) -> Tensor:
        if not self.mpu.is_last_stage:
            return torch.zeros((), dtype=torch.float32, device=self.device)
        mean = torch.stack(losses).mean()
        self._average_over_replicas(mean)
        return mean

    def _average_over_replicas(self, value: Tensor) -> None:
        if self.mpu.layout.dp > 1:
            dist.all_reduce(value, group=self.mpu.data.process_group)
            value /= self.mpu.layout.dp

    def _spread(self, losses: list[Tensor], num_micro_batches: int) -> list[Tensor]:
        stacked = torch.stack(losses) if losses else torch.zeros(num_micro_batches, device=self.device)
        return list(self._broadcast_from_last(stacked))

    def _broadcast_from_last(self, value: Tensor) -> Tensor:
        if self.mpu.layout.pp > 1:
            last = self.mpu.stage_rank(self.mpu.num_stages - 1)
            work = dist.broadcast(value, src=last, group=self.mpu.pipe.process_group, async_op=True)
            assert work is not None
            wait(work, "what the last stage computed")
        return value

    def destroy(self) -> None:
        """Free the engine's process groups, unless another engine uses them. All ranks call this together.

        The module communicates through them, and cannot be used any more.
        """
        if self._is_destroyed:
            return
        self._is_destroyed = True
        super().destroy()  # type: ignore[misc]
        self.mpu.release_engine()
        drop_process_groups(self)
        del self.executor
        gc.collect()

    def __del__(self) -> None:
        # DeepSpeed's calls `destroy`, for which all ranks must come together.
        if not self._is_destroyed:
            with suppress(Exception):
                super().destroy()  # type: ignore[misc]

    def check_replicas(self) -> None:
        """Check that all ranks that hold the same tensor hold the same bits of it. All ranks call this together.

        Raises:
            ReplicaError: on every rank, with the tensors that differ and the ranks on which they do.
        """
        check_consistency(self.module, self.mpu, step=self.global_steps)

    def save_checkpoint(
        self,
        save_dir: str | Path,
        tag: str | None = None,
        client_state: Mapping[str, Any] | None = None,
        save_latest: bool = True,
        exclude_frozen_parameters: bool = False,
    ) -> bool:
        """Write a checkpoint into a folder; every rank calls this together. Any layout reads it.

        Args:
            save_dir: the folder, which every rank sees.
            tag: name of the checkpoint; made from the step unless given.
            client_state: further values to keep: numbers, texts, lists and dicts.
            save_latest: whether `latest` names it from now on.
            exclude_frozen_parameters: not taken.
        """
        from pipekit.engine.engine_state import save_engine

        if exclude_frozen_parameters:
            raise PipekitError("save_checkpoint always writes frozen parameters; leave exclude_frozen_parameters out")
        save_engine(self, Path(save_dir), name=tag, client_state=client_state or {}, update_latest=save_latest)
        return True

    def load_checkpoint(
        self,
        load_dir: str | Path,
        tag: str | None = None,
        load_module_strict: bool = True,
        load_optimizer_states: bool = True,
        load_lr_scheduler_states: bool = True,
        load_module_only: bool = False,
        custom_load_fn: Any = None,
    ) -> tuple[str | None, dict[str, Any] | None]:
        """Read a checkpoint that `save_checkpoint` or a run wrote, whatever layout wrote it.

        Args:
            load_dir: the folder that it was saved into.
            tag: name of the checkpoint; the newest unless given.
            load_module_strict: not taken as False.
            load_optimizer_states: whether to read the optimizer's states.
            load_lr_scheduler_states: whether to read the learning-rate scheduler's state.
            load_module_only: whether to read weights alone.
            custom_load_fn: not taken.

        Returns:
            The checkpoint's path and the `client_state` it holds; None and None where the folder holds no checkpoint.
        """
        from pipekit.engine.engine_state import load_engine

        if not load_module_strict:
            raise PipekitError(
                "load_checkpoint refuses a checkpoint of another model; leave load_module_strict out, and change the "
                "module to what was saved"
            )
        if custom_load_fn is not None:
            raise PipekitError("load_checkpoint takes no custom_load_fn; change the weights after loading")
        return load_engine(
            self,
            Path(load_dir),
            name=tag,
            optimizer_states=load_optimizer_states and not load_module_only,
            scheduler_state=load_lr_scheduler_states and not load_module_only,
        )


def _take_outputs(outputs: Any, labels: Any) -> Any:
    return whole_outputs(outputs)
