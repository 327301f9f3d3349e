"""Pipeline engine: training steps across stages and replicas, with DeepSpeed's optimizers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch.distributed as dist
from deepspeed.runtime.pipe.engine import PipelineEngine as DeepSpeedPipelineEngine
from torch import Tensor, nn

from pipekit.distributed.processes import tell_object
from pipekit.engine.executor import Executor
from pipekit.engine.module import PipelineModule
from pipekit.engine.reduction import GradientReducer, reduce_together
from pipekit.engine.training_engine import TrainingEngine
from pipekit.errors import PipekitError
from pipekit.schedules import Timeline, median_costs
from pipekit.tensor_parallel import has_partial_gradient, shard_of

# Steps whose actions are timed before a table is planned for them; the first does much that is never done again.
_MEASURED_STEPS = 3


class PipelineEngine(TrainingEngine, DeepSpeedPipelineEngine):  # type: ignore[misc]
    """Engine that trains a `PipelineModule`.

    It is DeepSpeed's engine with a different executor: actions follow a schedule's table, messages are asynchronous,
    tied and replicated gradients are reduced and counted once under every optimizer, and a step with gradients that are
    not finite is skipped and counted.

    Its arguments are those of `TrainingEngine`.
    """

    # Until its constructor ends, DeepSpeed's engine asks for neighbouring ranks, and means those of one stage each.
    _is_built = False

    def __init__(self, module: PipelineModule, **settings: Any) -> None:
        super().__init__(module, **settings)
        self._reducer = GradientReducer(self.view, self.mpu.data, shared=self._shared_parameters())
        self._stages_left: set[int] = set()
        self._timelines: list[Timeline] = []
        self._is_built = True

    def _build_executor(self) -> Executor:
        return Executor(
            self.module, self.mpu, view=self.view, device=self.device, last_gradients=self._reducing_gradients_of
        )

    def is_first_stage(self) -> bool:
        """True on the ranks of the first stage."""
        return self.mpu.is_first_stage if self._is_built else super().is_first_stage()

    def is_last_stage(self) -> bool:
        """True on the ranks of the last stage."""
        return self.mpu.is_last_stage if self._is_built else super().is_last_stage()

    def train_batch(self, data_iter: Iterator[Any] | None = None) -> Tensor:
        self._begin_training(data_iter)
        self._stages_left = set(self.mpu.stages)
        # DeepSpeed's gradient hooks take a backward outside its own `backward` for a mistake.
        self._running_engine_backward = True
        try:
            with self._diagnostics.watch(self.global_steps):
                losses = self.executor.run(
                    self.schedule,
                    self.data_iterator,
                    loss_fn=self.module.loss_fn,
                    loss_weight=self.module.loss_weight,
                    loss_scale=self.view.loss_scale,
                    dropout_step=self.global_steps,
                )
        finally:
            self._running_engine_backward = False
        self.mpu.activity.note("reducing the gradients")
        own_loss = self._mean_of_replicas(losses)
        loss = self._sum_loss_along(own_loss)
        if self.module.layer_drop is not None:
            # A block that every micro-batch leaves out is updated all the same, with a gradient of zero.
            for parameter in filter(lambda each: each.requires_grad, self.module.parameters()):
                self.view.gradient_or_zeros(parameter)
        self._reducer.finish()
        self._reduce_gradients_of_tensor_replicas()
        self._reduce_tied_gradients()
        if self.module.idle is not None:
            # So that the optimizer has the states of every other rank's, under their names.
            self.view.gradient_or_zeros(self.module.idle)
        if self.before_update is not None:
            self.before_update()
        if self.on_gradients is not None:
            self.on_gradients(self.view.gradient)
        self.mpu.activity.note("updating the weights")
        self.view.hand_over_gradients()
        self._update()
        self.view.clear_gradients()
        self.mpu.activity.note("ending the step")
        if self._measure_costs:
            self._learn_costs()
        loss = self._broadcast_from_last(own_loss) if self.view.sums_along else loss
        if self.monitor.enabled:
            self._report(train_loss=loss, lr=self.get_lr()[0])
        return loss

    def set_train_micro_batch_size(self, micro_batch_size: int) -> None:
        """Set the number of sequences in a micro-batch; the number of micro-batches in a step does not change."""
        super().set_train_micro_batch_size(micro_batch_size)
        self.micro_batch_size = micro_batch_size

    def _learn_costs(self) -> None:
        """Time the step that has just ended; after the last timed step, plan the table for the measured costs."""
        self._timelines.append(self.gather_timeline())
        if len(self._timelines) < _MEASURED_STEPS:
            return
        # Every pipeline takes the times of the first, so that all run one table.
        self._costs = tell_object(median_costs(self._timelines[1:]))
        self._measure_costs, self._timelines = False, []
        if not self._profile:
            self.executor.stopwatch = None
        self._schedules = {key: schedule for key, schedule in self._schedules.items() if key[0] == "eval"}

    def _shared_parameters(self) -> list[nn.Parameter]:
        """Parameters that ranks of other stages or tensor-parallel ranks hold too."""
        tied = [weight for weight, _ in self.module.get_tied_weights_and_groups()]
        return [*tied, *self._tensor_replicas()]

    def _tensor_replicas(self) -> list[nn.Parameter]:
        if self.module.tensor_group is None:
            return []
        return [each for each in self.module.parameters() if each.requires_grad and shard_of(each) is None]

    def _reducing_gradients_of(self, stage: int, weights: list[Tensor] | None) -> AbstractContextManager[None]:
        """Reduce the gradients of a stage as its last ones arrive, except those that a later stage shares with it."""
        self._stages_left.discard(stage)
        awaited = {parameter for other in self._stages_left for parameter in self.module.stage_parameters(other)}
        parameters = [each for each in self.module.stage_parameters(stage) if each not in awaited]
        whole = self.on_gradients is not None or self.view.needs_whole_gradients
        return self._reducer.reducing(parameters, weights, whole=whole)

    def _reduce_gradients_of_tensor_replicas(self) -> None:
        """Make the gradients of parameters that tensor-parallel ranks hold whole equal on all of them, to the bit.

        Gradients that come from each rank's part of the sequence are summed. The others differ by rounding alone, as
        kernels may sum in another order on each rank, and are averaged.
        """
        gradients = []
        for parameter in self._tensor_replicas():
            gradients.append(self.view.gradient_or_zeros(parameter))
            if not has_partial_gradient(parameter):
                gradients[-1].div_(self.mpu.layout.tp)
        if gradients:
            assert self.module.tensor_group is not None
            reduce_together(gradients, self.module.tensor_group.all_reduce)

    def _reduce_tied_gradients(self) -> None:
        for weight, group in self.module.get_tied_weights_and_groups():
            gradient = self.view.gradient(weight)
            if gradient is None:
                raise PipekitError(
                    "a tied parameter received no gradient on this stage; every layer that shares it must use it"
                )
            dist.all_reduce(gradient, group=group)

    def _update(self) -> None:
        self._force_grad_boundary = True
        self._take_model_step(None)
        self._force_grad_boundary = False
