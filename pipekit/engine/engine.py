"""The pipeline engine: one training step across stages and replicas, on DeepSpeed's optimizers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.config import DeepSpeedConfig
from deepspeed.runtime.pipe.engine import PipelineEngine as DeepSpeedPipelineEngine
from torch import Tensor, nn

from pipekit.engine.executor import Executor, Observer
from pipekit.engine.micro_batches import BatchFunction
from pipekit.engine.module import PipelineModule
from pipekit.engine.mpu import ModelParallelUnit
from pipekit.engine.optimizers import view_optimizer
from pipekit.engine.reduction import GradientReducer
from pipekit.errors import PipekitError
from pipekit.schedules import Schedule, plan_1f1b, plan_forward_only

OptimizerBuilder = Callable[[list[nn.Parameter]], torch.optim.Optimizer]
SchedulePlanner = Callable[[int], Schedule]
"""Returns the table of a step of so many micro-batches."""


class PipelineEngine(DeepSpeedPipelineEngine):  # type: ignore[misc]
    """Trains a `PipelineModule`.

    It is DeepSpeed's engine with its own execution: actions come from a schedule's table, messages are asynchronous,
    tied and replicated gradients are reduced and counted once under every optimizer, and a step whose gradients are not
    finite is skipped and counted.

    Args:
        module: this rank's stages.
        mpu: the process groups; the module's own.
        build_optimizer: called with the rank's trainable parameters; returns a torch optimizer. None where DeepSpeed's
            configuration names one.
        deepspeed_config: DeepSpeed's configuration.
        plan_schedule: returns the table of a step; 1F1B where there is one stage a rank, unless given.
        **deepspeed_args: what else DeepSpeed's engine is given.
    """

    def __init__(
        self,
        module: PipelineModule,
        *,
        mpu: ModelParallelUnit,
        build_optimizer: OptimizerBuilder | None,
        deepspeed_config: Mapping[str, Any],
        plan_schedule: SchedulePlanner | None = None,
        **deepspeed_args: Any,
    ) -> None:
        parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
        if not parameters:
            # DeepSpeed refuses a rank without parameters; an idle one keeps every rank in step.
            idle = nn.Parameter(torch.zeros(1, device=get_accelerator().current_device_name()))
            idle.ds_pipe_replicated = True  # type: ignore[attr-defined]
            module.register_parameter("idle", idle)
            parameters = [idle]
        config = dict(deepspeed_config)
        # Until its constructor ends, DeepSpeed's engine asks for neighbouring ranks, and means those of one stage each.
        self._is_built = False
        super().__init__(
            args=None,
            model=module,
            mpu=mpu,
            config=config,
            config_class=DeepSpeedConfig(config, mpu),
            **{
                "optimizer": build_optimizer(parameters) if build_optimizer is not None else None,
                "model_parameters": parameters,
                **deepspeed_args,
            },
        )
        self.unit = mpu
        self.view = view_optimizer(self.optimizer, mpu)
        self.executor = Executor(
            module, mpu, view=self.view, device=self.device, on_stage_done=self._reduce_gradients_of
        )
        self._reducer = GradientReducer(self.view, mpu.data)
        self._stages_left: set[int] = set()
        self._plan_schedule = plan_schedule or self._plan_1f1b
        self._schedules: dict[tuple[str, int], Schedule] = {}
        self._is_built = True

    def _plan_1f1b(self, num_micro_batches: int) -> Schedule:
        return plan_1f1b(num_stages=self.unit.num_stages, num_micro_batches=num_micro_batches)

    @property
    def schedule(self) -> Schedule:
        """The table of a training step."""
        key = ("train", self.micro_batches)
        if key not in self._schedules:
            self._schedules[key] = self._plan_schedule(self.micro_batches)
        return self._schedules[key]

    def _evaluation_schedule(self, num_micro_batches: int) -> Schedule:
        key = ("eval", num_micro_batches)
        if key not in self._schedules:
            self._schedules[key] = plan_forward_only(
                num_stages=self.unit.num_stages, num_micro_batches=num_micro_batches, placement=self.unit.placement
            )
        return self._schedules[key]

    def set_batch_fn(self, fn: BatchFunction) -> None:
        """Set what makes a pair of inputs and labels of what a data iterator yields."""
        self.executor.reader.batch_fn = fn

    def is_first_stage(self) -> bool:
        """Whether this process holds the first stage."""
        return self.unit.is_first_stage if self._is_built else super().is_first_stage()

    def is_last_stage(self) -> bool:
        """Whether this process holds the last stage."""
        return self.unit.is_last_stage if self._is_built else super().is_last_stage()

    def train_batch(self, data_iter: Iterator[Any] | None = None) -> Tensor:
        """Train on one global batch.

        Args:
            data_iter: yields `num_micro_batches` pairs of inputs and labels; read on the first and the last stage. The
                training data that the engine was built with, unless given.

        Returns:
            The mean loss over the global batch before the update, in fp32, on every rank.
        """
        if not torch.is_grad_enabled():
            raise PipekitError("train_batch needs gradients; call it outside torch.no_grad(), or use eval_batch")
        self.module.train()
        self._stages_left = set(self.unit.stages)
        # DeepSpeed's gradient hooks take a backward outside its own `backward` for a mistake.
        self._running_engine_backward = True
        try:
            losses = self.executor.run(
                self.schedule,
                self.data_iterator if data_iter is None else data_iter,
                loss_fn=self.module.loss_fn,
                loss_scale=self.view.loss_scale,
                dropout_step=self.global_steps,
            )
        finally:
            self._running_engine_backward = False
        self._reducer.finish()
        self._reduce_tied_gradients()
        self.view.hand_over_gradients()
        self._update()
        return self._mean_loss(losses)

    def eval_batch(
        self,
        data_iter: Iterator[Any] | None,
        num_micro_batches: int | None = None,
        *,
        observe: Observer | None = None,
    ) -> Tensor:
        """Return the mean loss of one global batch, in fp32, on every rank, without training on it.

        Args:
            data_iter: yields `num_micro_batches` pairs of inputs and labels; read on the first and the last stage.
            num_micro_batches: as many as in training, unless given.
            observe: called on the last stage with each micro-batch's outputs and labels.
        """
        self.module.eval()
        schedule = self._evaluation_schedule(num_micro_batches or self.micro_batches)
        with torch.no_grad():
            return self._mean_loss(
                self.executor.run(schedule, data_iter, loss_fn=self.module.loss_fn, observe=observe)
            )

    @property
    def grad_norm(self) -> float:
        """The 2-norm of the last step's gradient, before clipping; infinite where the step was skipped."""
        norm = self._global_grad_norm
        return float("nan") if norm is None else float(norm)

    def set_lr(self, lr: float) -> None:
        """Set the learning rate of the next step."""
        self.view.set_lr(lr)

    def _reduce_gradients_of(self, stage: int) -> None:
        """Begin to reduce the gradients of a stage that is done, except what a stage yet to come shares with it."""
        self._stages_left.discard(stage)
        awaited = {parameter for other in self._stages_left for parameter in self.module.stage_parameters(other)}
        self._reducer.start(
            parameter for parameter in self.module.stage_parameters(stage) if parameter not in awaited
        )

    def _reduce_tied_gradients(self) -> None:
        for weight, group in self.module.get_tied_weights_and_groups():
            gradient = self.view.gradient(weight)
            if gradient is None:
                raise PipekitError(
                    "a tied parameter received no gradient on this stage; every layer that shares it must use it"
                )
            dist.all_reduce(gradient, group=group)

    def _update(self) -> None:
        plain = isinstance(self.optimizer, torch.optim.Optimizer)
        if plain:
            self._global_grad_norm = self.view.global_norm(self.module.parameters())
            if not torch.isfinite(self._global_grad_norm):
                self._skip_update()
                return
        self._force_grad_boundary = True
        self._take_model_step(None)
        self._force_grad_boundary = False

    def _skip_update(self) -> None:
        self.zero_grad()
        self._global_grad_norm = torch.tensor(float("inf"))
        self.skipped_steps += 1
        self.global_steps += 1
        self.global_samples += self.train_batch_size()

    def clip_fp32_gradients(self) -> None:
        """Clip by the norm of the whole model's gradient; DeepSpeed's counts only the first stage's."""
        assert self._global_grad_norm is not None
        coefficient = (self.gradient_clipping() / (self._global_grad_norm + 1e-6)).clamp(max=1.0)
        gradients = [parameter.grad for parameter in self.module.parameters() if parameter.grad is not None]
        if gradients:
            torch._foreach_mul_(gradients, coefficient)

    def _mean_loss(self, losses: list[Tensor]) -> Tensor:
        if self.unit.is_last_stage:
            mean = torch.stack(losses).mean()
            if self.unit.layout.dp > 1:
                dist.all_reduce(mean, group=self.unit.data.process_group)
                mean /= self.unit.layout.dp
        else:
            mean = torch.zeros((), dtype=torch.float32, device=self.device)
        if self.unit.layout.pp > 1:
            last = self.unit.stage_rank(self.unit.num_stages - 1)
            dist.broadcast(mean, src=last, group=self.unit.pipe.process_group)
        return mean
