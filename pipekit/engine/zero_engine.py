"""The engine without a pipeline under ZeRO-2 and 3: every rank runs the whole model, and keeps a piece of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.utils import safe_get_full_grad
from torch import Tensor

from pipekit.deepspeed.patches import linear_function, number_from_zero
from pipekit.distributed.mpu import ModelParallelUnit
from pipekit.distributed.processes import raise_together
from pipekit.engine.executor import Executor
from pipekit.engine.micro_batches import MicroBatchReader, StepData
from pipekit.engine.module import PipelineModule
from pipekit.engine.partial_gradients import sum_gradients_over
from pipekit.engine.training_engine import TrainingEngine
from pipekit.errors import ConfigError
from pipekit.tensor_parallel import Logits, has_partial_gradient


class ZeroEngine(TrainingEngine, DeepSpeedEngine):  # type: ignore[misc]
    """Trains a `PipelineModule` of one stage under ZeRO-2 or 3.

    To its users it behaves like `PipelineEngine`. Each micro-batch goes forward and back at once, through DeepSpeed's
    own engine: its hooks reduce every gradient as soon as it is there, each rank keeps its piece of the sum, and under
    ZeRO-3 they fetch the weights of a layer before it runs and let them go after it.

    Its arguments are those of `TrainingEngine`; whatever the module's schedule, it runs 1F1B.

    Raises:
        ConfigError: if the module has more than one stage.
    """

    def __init__(self, module: PipelineModule, *, deepspeed_config: Mapping[str, Any], **settings: Any) -> None:
        mpu = module.mpu()
        if mpu.num_stages != 1:
            raise ConfigError(
                f"ZeRO-{deepspeed_config['zero_optimization']['stage']} needs a model of one stage, and this one has "
                f"{mpu.num_stages}; try ZeRO-1, or one stage"
            )
        module.schedule = "1f1b"
        trained = (parameter for parameter in module.parameters() if parameter.requires_grad)
        sum_gradients_over(mpu.tensor, filter(has_partial_gradient, trained))
        if module.partitioner is None:
            number_from_zero()
        self.data_iterator: Iterator[Any] | None = None
        self._micro_batches_done = 0
        with linear_function(F.linear):
            super().__init__(module, deepspeed_config=deepspeed_config, **settings)
            self._own_linear = F.linear if module.partitioner is None else module.partitioner.linear

    def _build_executor(self) -> Executor:
        executor = Executor(
            self.module, self.mpu, view=self.view, device=self.device, forward=self, backward=self._backward
        )
        executor.reader = _AgreeingReader(self.mpu)
        return executor

    # DeepSpeed's own pipeline engine sets these two; its plain one has functions in their place.

    @property
    def micro_batches(self) -> int:  # type: ignore[override]
        """Micro-batches of a step on each rank."""
        return int(self.gradient_accumulation_steps())

    @property
    def micro_batch_size(self) -> int:  # type: ignore[override]
        """Sequences of a micro-batch."""
        return int(self.train_micro_batch_size_per_gpu())

    # `Diagnostics` does what these ask for, under both engines; DeepSpeed would do it a second time.

    def wall_clock_breakdown(self) -> bool:
        """False: timing is the affair of `Diagnostics`."""
        return False

    def flops_profiler_enabled(self) -> bool:
        """False: counting operations is the affair of `Diagnostics`."""
        return False

    def set_dataiterator(self, iterator: Iterator[Any] | None) -> None:
        """Set the iterator that `train_batch` reads if it is given none."""
        self.data_iterator = iterator

    def train_batch(self, data_iter: Iterator[Any] | None = None) -> Tensor:
        self._begin_training(data_iter)
        self._micro_batches_done = 0
        with self._diagnostics.watch(self.global_steps), linear_function(self._own_linear):
            losses = self.executor.run(
                self.schedule,
                self.data_iterator,
                loss_fn=self._loss,
                loss_weight=self.module.loss_weight,
                dropout_step=self.global_steps,
            )
        self.mpu.activity.note("reducing the gradients")
        if self.view.is_offloaded:
            self.optimizer.finalize_gradient_accumulation_boundary()
        self.set_gradient_accumulation_boundary(True)
        if self.before_update is not None:
            self.before_update()
        if self.on_gradients is not None:
            self.on_gradients(safe_get_full_grad)
        own_loss = self._mean_of_replicas(losses)
        loss = self._sum_loss_along(own_loss)
        self.mpu.activity.note("updating the weights")
        self.step()
        self.view.clear_gradients()
        self.mpu.activity.note("ending the step")
        return own_loss if self.view.sums_along else loss

    def eval_batch(self, *args: Any, **kwargs: Any) -> Any:
        with linear_function(self._own_linear):
            return super().eval_batch(*args, **kwargs)

    def _loss(self, outputs: Any, labels: Any) -> Any:
        if isinstance(outputs, Logits) and self.zero_optimization_partition_weights():
            raise ConfigError(
                "the last layer returns Logits, whose loss needs the head's weights after ZeRO-3 has let them go; try "
                "ZeRO-2, or, without tensor parallelism, let it return a tensor"
            )
        return outputs if self.module.loss_fn is None else self.module.loss_fn(outputs, labels)

    def _backward(self, outputs: tuple[Tensor, ...], gradients: tuple[Tensor, ...]) -> None:
        """Do the backward of a micro-batch; DeepSpeed divides its loss by their number, and scales it in fp16."""
        self._micro_batches_done += 1
        is_last = self._micro_batches_done == self.micro_batches
        # DeepSpeed counts calls, and would lose count when a step fails or the batch size changes. With masters in host
        # memory it hands over at the boundary only what the last micro-batch has used; `train_batch` hands over all.
        self.set_gradient_accumulation_boundary(is_last and not self.view.is_offloaded)
        (loss,) = outputs
        self.backward(loss)
        if not is_last:
            self.step()


class _AgreeingReader(MicroBatchReader):
    """Reads each step's micro-batches, and lets every rank know if any could not.

    ZeRO-2 and 3 talk during each backward, and ZeRO-3 during each forward, so that no rank may begin a step alone.

    Args:
        mpu: the process groups.
    """

    def __init__(self, mpu: ModelParallelUnit) -> None:
        super().__init__(mpu, None)
        # On CPUs: over the device's group, the host would wait for the step before.
        self._world = mpu.build_group([range(mpu.layout.world_size)], "gloo", purpose="headers")

    def read(self, data: Iterator[Any] | None, num_micro_batches: int) -> StepData:
        step_data, error = None, None
        try:
            step_data = super().read(data, num_micro_batches)
        except Exception as failure:
            error = failure
        failed = torch.tensor(error is not None, dtype=torch.uint8)
        assert self._world is not None
        dist.all_reduce(failed, op=dist.ReduceOp.MAX, group=self._world.process_group)
        if failed:
            raise_together(error)
        assert step_data is not None
        return step_data
