"""Evaluation, data and losses of both engines of a `PipelineModule`, with a pipeline and without."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from pipekit.data.collate import MapDataset
from pipekit.data.replica_loader import ReplicaLoader
from pipekit.distributed.processes import gather_objects, wait
from pipekit.engine.base_engine import BaseEngine
from pipekit.engine.diagnostics import Diagnostics
from pipekit.engine.executor import Executor, Observer
from pipekit.engine.logical_model import LogicalModel
from pipekit.engine.micro_batches import BatchFunction, TrainingData, join_batches
from pipekit.engine.module import PipelineModule
from pipekit.engine.stopwatch import Stopwatch
from pipekit.errors import ConfigError, PipekitError
from pipekit.schedules import Costs, Schedule, Timeline, plan_forward_only, plan_schedule
from pipekit.tensor_parallel import whole_outputs
from pipekit.tensors.nested import flatten, unflatten

# What `train_batch` changes in an engine beside weights, gradients and optimizer.
_STEP_STATE = ("global_steps", "global_samples", "micro_steps", "skipped_steps", "_step_applied", "_global_grad_norm")


class TrainingEngine(BaseEngine):
    """The part of an engine of a `PipelineModule` that does not depend on how gradients are reduced.

    It comes before one of DeepSpeed's engines in the bases of a class.

    Args:
        module: this rank's stages, and the schedule to run.
        deepspeed_config: DeepSpeed's configuration.
        measure_costs: whether to time the actions of the first steps and then plan a new table for the measured costs.
        max_in_flight: largest number of stage activations that a rank may hold under the new table.
        profile: whether to time the actions of every step, for `gather_timeline`.
        **settings: the other arguments of `BaseEngine`.
    """

    # Set by DeepSpeed's engine.
    module: PipelineModule
    micro_batches: int
    micro_batch_size: int
    training_dataloader: Any
    data_iterator: Iterator[Any] | None
    steps_per_print: Callable[[], int | None]
    set_dataiterator: Callable[[Iterator[Any] | None], None]
    set_train_batch_size: Callable[[int], None]
    dataloader_drop_last: Callable[[], bool | None]
    zero_optimization_stage: Callable[[], int]
    is_compiled: bool
    monitor: Any
    _config: Any

    before_update: Callable[[], None] | None = None
    """Called in every training step when all gradients are complete, before the update."""

    def __init__(
        self,
        module: PipelineModule,
        *,
        deepspeed_config: Mapping[str, Any],
        measure_costs: bool = False,
        max_in_flight: int | None = None,
        profile: bool = False,
        **settings: Any,
    ) -> None:
        super().__init__(module, module.mpu(), deepspeed_config=deepspeed_config, **settings)
        self.executor = self._build_executor()
        self._measure_costs = measure_costs and self.mpu.layout.pp > 1
        self._max_in_flight = max_in_flight
        self._profile = profile
        if profile or self._measure_costs:
            self.executor.stopwatch = Stopwatch(self.device)
        self._diagnostics = Diagnostics(self)
        self._costs: Costs | None = None
        self._schedules: dict[tuple[str, int], Schedule] = {}

    @property
    def logical(self) -> LogicalModel:
        return self.module

    def destroy(self) -> None:
        if not self._is_destroyed:
            del self.executor
            super().destroy()

    def _build_executor(self) -> Executor:
        raise NotImplementedError

    def train_batch(self, data_iter: Iterator[Any] | None = None) -> Tensor:
        """Train on one global batch.

        Args:
            data_iter: yields `num_micro_batches` pairs of inputs and labels; read on the first and the last stage. By
                default it reads the training data that the engine was built with.

        Returns:
            The mean loss over the global batch before the update, in fp32, on every rank.
        """
        raise NotImplementedError

    @property
    def can_compute_again(self) -> bool:
        """True if `computing_again` works under this optimizer and configuration."""
        return self.view.can_leave_out and self.torch_autocast_z0_gradscaler is None

    @contextmanager
    def computing_again(self, step: int) -> Iterator[None]:
        """Context manager in which `train_batch` computes a step without an update, and changes no state.

        Weights, optimizer, loss scale and counters do not change, and `on_gradients` is not called. Random numbers are
        those of the step. All ranks do this together.

        Args:
            step: number of the step, from 0.
        """
        kept = {name: getattr(self, name) for name in _STEP_STATE if hasattr(self, name)}
        view, scaler = self.view, self.view.loss_scaler_state()
        accepts, observer, measures = view.accepts, self.on_gradients, self._measure_costs
        view.accepts, self.on_gradients, self._measure_costs = (lambda loss: False), None, False
        self.global_steps = step
        try:
            yield
        finally:
            view.accepts, self.on_gradients, self._measure_costs = accepts, observer, measures
            vars(self).update(kept)
            view.load_loss_scaler_state(scaler)

    def _sum_loss_along(self, own_loss: Tensor) -> Tensor:
        """Let the loss of the last stage reach all ranks with the norm, in the tensor that is returned."""
        # The first tensor-parallel rank speaks for the others of its stage.
        loss = own_loss.clone() if self.mpu.tensor.rank == 0 else torch.zeros_like(own_loss)
        self.view.sum_along(loss)
        return loss

    def _begin_training(self, data_iter: Iterator[Any] | None) -> None:
        if not torch.is_grad_enabled():
            raise PipekitError("train_batch needs gradients; call it outside torch.no_grad(), or use eval_batch")
        if data_iter is not None:
            self.set_dataiterator(data_iter)
        self.module.train()

    @property
    def schedule(self) -> Schedule:
        """Schedule table of a training step.

        Raises:
            ConfigError: if the module's schedule cannot run with this number of micro-batches.
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
        """Set the function that converts each item of a data iterator to a pair of inputs and labels."""
        self.executor.reader.batch_fn = fn

    def set_training_data(self, dataset: MapDataset, collate: Callable[[list[Any]], Any] | None = None) -> None:
        """Set the dataset that `train_batch` reads without an iterator, in the order of DeepSpeed's pipeline engine.

        Samples are read in order, and then again from the first; see `ReplicaLoader`. The position follows from
        `global_samples`, which checkpoints hold.

        Args:
            dataset: a map-style dataset of pairs of inputs and labels.
            collate: makes a micro-batch from a list of samples; by default it stacks pairs of inputs and labels.
        """
        loader = ReplicaLoader(
            dataset,
            micro_batch_size=self.micro_batch_size,
            num_micro_batches=self.micro_batches,
            dp_rank=self.mpu.data_parallel_rank,
            dp=self.mpu.layout.dp,
            drop_last=bool(self.dataloader_drop_last()),
            collate=collate,
        )
        each = self.micro_batch_size * self.mpu.layout.dp
        self.set_dataloader(
            TrainingData(
                loader,
                lambda: int(self.global_samples) // each,
                lambda: self.micro_batches,
                pin_memory=self.device.type == "cuda",
            )
        )

    def set_dataloader(self, loader: Iterable[Any]) -> None:
        """Set the loader of micro-batches that `train_batch` reads without an iterator.

        Args:
            loader: yields pairs of inputs and labels, without end; read on the first and the last stage.
        """
        self.set_dataiterator(iter(loader) if self.mpu.should_build_data_loader else None)
        self.training_dataloader = loader

    def compile(
        self,
        backend: str | Callable[..., Any] = "inductor",
        compile_kwargs: Mapping[str, Any] | None = None,
        schedule: Any = None,
        compiled_autograd_enabled: bool = False,
    ) -> None:
        """Compile each layer of this rank separately with `torch.compile`; a second call does nothing.

        Args:
            backend: a compiler, by its name in torch or as a function.
            compile_kwargs: further arguments of `torch.compile`.
            schedule: not supported: passes of DeepCompile.
            compiled_autograd_enabled: not supported.

        Raises:
            ConfigError: under ZeRO-3, or if one of the last two is given.
        """
        if schedule is not None or compiled_autograd_enabled:
            raise ConfigError("compile takes neither schedule nor compiled_autograd_enabled; leave them out")
        if self.zero_optimization_stage() == 3:
            raise ConfigError(
                "compile does not go with zero_optimization.stage=3, which gathers the weights of a layer in hooks "
                "that cannot be compiled; try stage 2"
            )
        if not self.is_compiled:
            self.module.compile(**{**(compile_kwargs or {}), "backend": backend})
            self._is_compiled = True

    def gather_timeline(self) -> Timeline:
        """Measured timeline of the last step on this pipeline. All ranks call this together.

        The engine must have been built with `profile=True`.
        """
        assert self.executor.stopwatch is not None, "the engine was built without profile=True"
        spans = [tuple(self.executor.stopwatch.spans())]
        if self.mpu.layout.pp > 1:
            spans = gather_objects(spans[0], self.mpu.pipe.process_group)
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
            return_logits: whether to return a pair: the loss, and the last layer's outputs for the whole batch on this
                pipeline, joined along their first dimension (None on ranks without the last stage).
            compute_loss: whether to compute losses; False returns the last layer's outputs in place of losses.
            reduce_output: `avg`; None returns a list of one entry per micro-batch of this pipeline, not the mean.
            bcast_loss: whether ranks without the last stage return the losses too, rather than None.
            num_micro_batches: number of micro-batches; by default that of training.
            observe: called on the last stage with each micro-batch's outputs and labels.

        Raises:
            ConfigError: if `reduce_output` or `num_micro_batches` has another value.
        """
        if reduce_output is not None and str(reduce_output).lower() != "avg":
            raise ConfigError(f"reduce_output={reduce_output}: must be 'avg', or None for a list")
        if num_micro_batches is not None and num_micro_batches < 1:
            raise ConfigError(f"num_micro_batches={num_micro_batches}: must be at least 1")
        self.module.eval()
        reports = bool(self.monitor.enabled and compute_loss and reduce_output)
        bcast_loss = bcast_loss or reports
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
        loss_weight = self.module.loss_weight if compute_loss else None
        with torch.no_grad():
            losses = self.executor.run(schedule, data_iter, loss_fn=loss_fn, loss_weight=loss_weight, observe=collect)
            if not compute_loss:
                result = self._mean_outputs(collected) if reduce_output else collected
            elif reduce_output:
                result = self._mean_loss(losses) if bcast_loss else self._mean_of_replicas(losses)
            else:
                result = self._spread(losses, schedule.num_micro_batches) if bcast_loss else losses
            if not (self.mpu.is_last_stage or (compute_loss and bcast_loss)):
                result = None
            if reports:
                self._report(eval_loss=result)
            if return_logits:
                return result, join_batches(collected)
        return result

    def _report(self, **values: Any) -> None:
        """Write values to the monitors that DeepSpeed's configuration switches on, under DeepSpeed's names."""
        if self.mpu.global_rank == 0 and self.monitor.enabled:
            events = [(f"Train/Samples/{name}", float(value), self.global_samples) for name, value in values.items()]
            self.monitor.write_events(events)

    def observe_batch(self, data_iter: Iterator[Any] | None, observe: Observer, *, num_micro_batches: int) -> None:
        """Forward a batch in evaluation mode without losses, and pass on its outputs. All ranks call this together.

        Args:
            data_iter: as in `eval_batch`.
            observe: called on the last stage with each micro-batch's outputs and labels, in order.
            num_micro_batches: number of micro-batches of this pipeline.
        """
        self.module.eval()
        with torch.no_grad():
            self.executor.run(
                self._evaluation_schedule(num_micro_batches),
                data_iter,
                loss_fn=lambda outputs, labels: None,
                observe=lambda outputs, labels: observe(whole_outputs(outputs), labels),
            )

    def _mean_outputs(self, outputs: list[Any]) -> Any:
        if not self.mpu.is_last_stage:
            return None
        tensors = [flatten(output, "the last layer's output")[0] for output in outputs]
        _, structure = flatten(outputs[0], "the last layer's output")
        means = [torch.stack([tensor.float() for tensor in parts]).mean(0) for parts in zip(*tensors, strict=True)]
        for mean in means:
            self._average_over_replicas(mean)
        return unflatten(means, structure)

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


def _take_outputs(outputs: Any, labels: Any) -> Any:
    return whole_outputs(outputs)
