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

from pipekit.engine.executor import Executor, MicroBatch, Observer
from pipekit.engine.module import PipelineModule
from pipekit.engine.mpu import ModelParallelUnit
from pipekit.engine.optimizers import view_optimizer
from pipekit.errors import PipekitError
from pipekit.schedules import Schedule, plan_1f1b, plan_forward_only

OptimizerBuilder = Callable[[list[nn.Parameter]], torch.optim.Optimizer]


class PipelineEngine(DeepSpeedPipelineEngine):  # type: ignore[misc]
    """Trains a `PipelineModule`.

    It is DeepSpeed's engine with its own execution: actions come from a schedule's table, messages are asynchronous,
    tied and replicated gradients are reduced and counted once under every optimizer, and a step whose gradients are not
    finite is skipped and counted.

    Args:
        module: this rank's stage.
        mpu: the process groups; the module's own.
        build_optimizer: called with the stage's trainable parameters; returns a torch optimizer.
        deepspeed_config: DeepSpeed's configuration.
        plan_schedule: returns the table for `(num_stages, num_micro_batches)`.
    """

    def __init__(
        self,
        module: PipelineModule,
        *,
        mpu: ModelParallelUnit,
        build_optimizer: OptimizerBuilder,
        deepspeed_config: Mapping[str, Any],
        plan_schedule: Callable[..., Schedule] = plan_1f1b,
    ) -> None:
        parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
        if not parameters:
            # DeepSpeed refuses a stage without parameters; an idle one keeps every rank in step.
            idle = nn.Parameter(torch.zeros(1, device=get_accelerator().current_device_name()))
            idle.ds_pipe_replicated = True  # type: ignore[attr-defined]
            module.register_parameter("idle", idle)
            parameters = [idle]
        config = dict(deepspeed_config)
        super().__init__(
            args=None,
            model=module,
            optimizer=build_optimizer(parameters),
            model_parameters=parameters,
            mpu=mpu,
            config=config,
            config_class=DeepSpeedConfig(config, mpu),
        )
        self.unit = mpu
        self.view = view_optimizer(self.optimizer, mpu)
        self.executor = Executor(module, mpu, device=self.device, after_backward=self.view.accumulate)
        self._plan_schedule = plan_schedule

    def train_batch(self, data_iter: Iterator[MicroBatch] | None = None) -> Tensor:
        """Train on one global batch.

        Args:
            data_iter: yields `num_micro_batches` pairs of inputs and labels; read on the first and the last stage.

        Returns:
            The mean loss over the global batch before the update, in fp32, on every rank.
        """
        if not torch.is_grad_enabled():
            raise PipekitError("train_batch needs gradients; call it outside torch.no_grad(), or use eval_batch")
        self.module.train()
        schedule = self._plan_schedule(num_stages=self.num_stages, num_micro_batches=self.micro_batches)
        # DeepSpeed's gradient hooks take a backward outside its own `backward` for a mistake.
        self._running_engine_backward = True
        try:
            losses = self.executor.run(
                schedule, data_iter, loss_scale=self.view.loss_scale, dropout_step=self.global_steps
            )
        finally:
            self._running_engine_backward = False
        self._reduce_tied_gradients()
        self._exec_reduce_grads()
        self._update()
        return self._mean_loss(losses)

    def eval_batch(
        self,
        data_iter: Iterator[MicroBatch] | None,
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
        schedule = plan_forward_only(
            num_stages=self.num_stages, num_micro_batches=num_micro_batches or self.micro_batches
        )
        with torch.no_grad():
            return self._mean_loss(self.executor.run(schedule, data_iter, observe=observe))

    @property
    def grad_norm(self) -> float:
        """The 2-norm of the last step's gradient, before clipping; infinite where the step was skipped."""
        norm = self._global_grad_norm
        return float("nan") if norm is None else float(norm)

    def set_lr(self, lr: float) -> None:
        """Set the learning rate of the next step."""
        self.view.set_lr(lr)

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
            dist.broadcast(mean, src=self.unit.stage_rank(self.num_stages - 1), group=self.unit.pipe.process_group)
        return mean
