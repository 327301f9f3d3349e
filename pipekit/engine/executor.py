"""The executor: does the actions of a schedule on this rank's stage, in the table's order."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pipekit.engine.channels import Receiver, Sender, TensorMeta
from pipekit.engine.module import Activations, PipelineModule
from pipekit.engine.mpu import ModelParallelUnit
from pipekit.errors import PipekitError
from pipekit.schedules import Action, Schedule

MicroBatch = tuple[Any, Any]
"""The inputs and the labels of one micro-batch."""

Observer = Callable[[Any, Any], None]
"""Called with the last layer's outputs and the labels of a micro-batch."""


@dataclass
class _InFlight:
    """What a stage keeps of a micro-batch between its forward and its backward."""

    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]


class Executor:
    """Runs schedules on one stage: receives, computes, sends.

    Args:
        module: this rank's stage.
        mpu: the process groups.
        device: where the stage computes.
        after_backward: called after each backward; where the optimizer accumulates gradients itself, it does so here.
    """

    def __init__(
        self,
        module: PipelineModule,
        mpu: ModelParallelUnit,
        *,
        device: torch.device,
        after_backward: Callable[[], None],
    ) -> None:
        self._module = module
        self._mpu = mpu
        self._device = device
        self._after_backward = after_backward
        self._activations_in: Receiver | None = None
        self._activations_out: Sender | None = None
        self._gradients_in: Receiver | None = None
        self._gradients_out: Sender | None = None
        if mpu.layout.pp > 1:
            self._open_channels()

    def _open_channels(self) -> None:
        pipelines = self._mpu.layout.groups("pipe")
        groups = [self._mpu.build_group(pipelines, backend) for backend in (None, None, "gloo")]
        activations, gradients, headers = (group.process_group for group in groups if group is not None)
        stage = self._mpu.pipe_rank
        if not self._mpu.is_first_stage:
            previous = self._mpu.stage_rank(stage - 1)
            self._activations_in = Receiver(peer=previous, group=activations, device=self._device, header_group=headers)
            self._gradients_out = Sender(peer=previous, group=gradients)
        if not self._mpu.is_last_stage:
            following = self._mpu.stage_rank(stage + 1)
            self._activations_out = Sender(peer=following, group=activations, header_group=headers)
            self._gradients_in = Receiver(peer=following, group=gradients, device=self._device)

    def run(
        self,
        schedule: Schedule,
        data: Iterator[MicroBatch] | None,
        *,
        loss_scale: float = 1.0,
        dropout_step: int | None = None,
        observe: Observer | None = None,
    ) -> list[Tensor]:
        """Do this rank's actions of `schedule`, and return each micro-batch's loss on the last stage.

        Args:
            schedule: the table.
            data: yields the micro-batches on the first and the last stage; not read on others.
            loss_scale: multiplies the loss before its backward; the gradients are those of the mean over micro-batches
                times this.
            dropout_step: the step that seeds dropout; None in evaluation.
            observe: called on the last stage with each micro-batch's outputs and labels.
        """
        run = _Run(self, schedule, data, loss_scale, dropout_step, observe)
        actions = schedule.ranks[self._mpu.pipe_rank]
        run.start(actions)
        for action in actions:
            if action.kind == "F":
                run.forward(action)
            elif action.kind == "B":
                run.backward(action)
            else:
                raise PipekitError(f"the executor does not know how to do {action}: F and B are what it can do")
        run.finish()
        return run.losses


class _Run:
    """The state of one pass through a schedule."""

    def __init__(
        self,
        executor: Executor,
        schedule: Schedule,
        data: Iterator[MicroBatch] | None,
        loss_scale: float,
        dropout_step: int | None,
        observe: Observer | None,
    ) -> None:
        self._module = executor._module
        self._mpu = executor._mpu
        self._device = executor._device
        self._after_backward = executor._after_backward
        self._activations_in = executor._activations_in
        self._activations_out = executor._activations_out
        self._gradients_in = executor._gradients_in
        self._gradients_out = executor._gradients_out
        self._num_micro_batches = schedule.num_micro_batches
        self._data = data if self._mpu.should_build_data_loader else None
        self._backward_scale = loss_scale / schedule.num_micro_batches
        self._dropout_step = dropout_step
        self._observe = observe
        self._in_flight: dict[int, _InFlight] = {}
        self.losses: list[Tensor] = []

    def start(self, actions: Sequence[Action]) -> None:
        num_forwards = sum(action.kind == "F" for action in actions)
        num_backwards = len(actions) - num_forwards
        for sender in (self._activations_out, self._gradients_out):
            if sender is not None:
                sender.start()
        if self._activations_in is not None:
            self._activations_in.start(num_forwards)
        if self._gradients_in is not None:
            self._gradients_in.start(num_backwards)

    def finish(self) -> None:
        assert not self._in_flight or not torch.is_grad_enabled(), "a forward was left without its backward"
        for sender in (self._activations_out, self._gradients_out):
            if sender is not None:
                sender.drain()

    def forward(self, action: Action) -> None:
        inputs, labels = self._load(action)
        if self._activations_in is not None:
            received = self._activations_in.receive(f"the activations of {action}")
            for tensor, meta in zip(received, self._activations_in.metas, strict=True):
                tensor.requires_grad_(meta.requires_grad and torch.is_grad_enabled())
            inputs = received[0] if len(received) == 1 else received
        outputs = self._module.forward_stage(inputs, dropout_path=self._dropout_path(action))
        if self._mpu.is_last_stage:
            outputs = self._loss(outputs, labels, action)
        tensors = _as_tuple(outputs, action)
        if torch.is_grad_enabled():
            self._in_flight[action.micro_batch] = _InFlight(_as_tuple(inputs, action), tensors)
        if self._activations_out is not None:
            self._activations_out.send(tensors, f"the output of {action}")
            if self._gradients_in is not None:
                self._gradients_in.expect(tuple(TensorMeta.of(tensor) for tensor in tensors if tensor.requires_grad))

    def backward(self, action: Action) -> None:
        flight = self._in_flight.pop(action.micro_batch)
        outputs = tuple(tensor for tensor in flight.outputs if tensor.requires_grad)
        if self._gradients_in is not None:
            gradients: tuple[Tensor, ...] = self._gradients_in.receive(f"the gradients of {action}")
        else:
            gradients = tuple(torch.full_like(tensor, self._backward_scale) for tensor in outputs)
        if outputs:
            torch.autograd.backward(outputs, gradients)
        self._after_backward()
        if self._gradients_out is not None:
            needed = (tensor for tensor in flight.inputs if tensor.requires_grad)
            self._gradients_out.send(
                tuple(torch.zeros_like(tensor) if tensor.grad is None else tensor.grad for tensor in needed),
                f"the input gradient of {action}",
            )

    def _load(self, action: Action) -> MicroBatch:
        if not self._mpu.should_build_data_loader:
            return None, None
        if self._data is None:
            raise PipekitError("the first and the last stage read batches, and were given no data iterator")
        try:
            inputs, labels = next(self._data)
        except StopIteration:
            raise PipekitError(
                f"the data ended at micro-batch {action.micro_batch} of {self._num_micro_batches}; a step reads "
                f"{self._num_micro_batches} micro-batches from its iterator: wrap a finite loader so that it repeats"
            ) from None
        return (
            _to_device(inputs, self._device) if self._mpu.is_first_stage else None,
            _to_device(labels, self._device) if self._mpu.is_last_stage else None,
        )

    def _loss(self, outputs: Activations, labels: Any, action: Action) -> Tensor:
        loss = outputs if self._module.loss_fn is None else self._module.loss_fn(outputs, labels)
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            what = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
            raise PipekitError(f"the loss of {action} is {what}; the loss function must return a scalar tensor")
        self.losses.append(loss.detach().float().reshape(()))
        if self._observe is not None:
            self._observe(outputs, labels)
        return loss

    def _dropout_path(self, action: Action) -> tuple[int, int] | None:
        if self._dropout_step is None:
            return None
        # The index within the global batch: the same micro-batch draws the same masks under every layout.
        return self._dropout_step, self._mpu.data_parallel_rank * self._num_micro_batches + action.micro_batch


def _as_tuple(activations: Any, action: Action) -> tuple[Tensor, ...]:
    tensors = activations if isinstance(activations, tuple) else (activations,)
    for tensor in tensors:
        if not isinstance(tensor, Tensor):
            raise PipekitError(
                f"a layer of stage {action.stage} takes or returns {type(tensor).__name__}; what passes between layers "
                "must be a tensor or a tuple of tensors"
            )
    return tensors


def _to_device(batch: Any, device: torch.device) -> Any:
    if isinstance(batch, Tensor):
        return batch.to(device, non_blocking=True)
    if isinstance(batch, (tuple, list)):
        return tuple(_to_device(part, device) for part in batch)
    return batch
