"""The executor: does the actions of a schedule on this rank's stages, in the table's order."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from pipekit.deepspeed.optimizer_view import OptimizerView
from pipekit.distributed.mpu import ModelParallelUnit
from pipekit.engine.channel_ends import ChannelEnds, has_pairs
from pipekit.engine.channels import Receiver, Sender, encode_meta
from pipekit.engine.micro_batches import MicroBatchReader, StepData
from pipekit.engine.module import PipelineModule
from pipekit.engine.stopwatch import Stopwatch
from pipekit.errors import PipekitError
from pipekit.schedules import Action, Schedule
from pipekit.schedules.acknowledgements import Acknowledgements, plan_acknowledgements
from pipekit.schedules.messages import destination, name_result
from pipekit.schedules.operations import POSTED_AHEAD, Operation, plan_operations
from pipekit.tensors.meta import NestedMeta, TensorMeta
from pipekit.tensors.nested import flatten, unflatten
from pipekit.tensors.transfer import to_device
from pipekit.tensors.weight_gradients import WeightGradients, deferring

Observer = Callable[[Any, Any], None]
"""Called with the last layer's outputs and the labels of a micro-batch."""

LossWeight = Callable[[Any], Tensor | None]
"""Called with the labels of a micro-batch; returns what that counts in the mean loss of the global batch, such as its
number of labels. None counts all micro-batches alike, and then does so for each."""

LastGradients = Callable[[int, list[Tensor] | None], AbstractContextManager[None]]
"""Called with a stage before the action that completes its gradients of a step, and with the weights that get gradients
in that action, each as often as it does; None for all of them, once. The action runs inside the context manager."""


@dataclass(frozen=True)
class _InFlight:
    """Tensors that a stage keeps of a micro-batch between its forward and its backward."""

    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]


@dataclass(frozen=True)
class _Table:
    """This rank's view of a schedule: its operations and acknowledgements."""

    schedule: Schedule
    operations: tuple[Operation, ...]
    acknowledgements: dict[int, Acknowledgements]
    gradient_of: dict[tuple[int, int], Action]
    last_of_stage: frozenset[Action]


class Executor:
    """Runs schedules on this rank's stages: receives, computes, sends.

    Args:
        module: this rank's stages.
        mpu: the process groups.
        view: where gradients accumulate.
        device: where the stages compute.
        last_gradients: wraps the action that completes a stage's gradients of a step.
        forward: called as the module's forward is, which it is unless given.
        backward: called with the outputs of a forward and their gradients; autograd's unless given.

    Attributes:
        total_weight: on the last stage, what all replicas' micro-batches of the last pass count together; None where
            they count alike.
    """

    def __init__(
        self,
        module: PipelineModule,
        mpu: ModelParallelUnit,
        *,
        view: OptimizerView,
        device: torch.device,
        last_gradients: LastGradients = lambda stage, weights: nullcontext(),
        forward: Callable[..., Any] | None = None,
        backward: Callable[[tuple[Tensor, ...], tuple[Tensor, ...]], None] = torch.autograd.backward,
    ) -> None:
        self._mpu = mpu
        self._view = view
        self._device = device
        self._last_gradients = last_gradients
        self._forward = forward or module.forward
        self._backward = backward
        self._senders: dict[int, Sender] = {}
        self._receivers: dict[int, Receiver] = {}
        # By the identity of the schedule, which its table keeps alive.
        self._tables: dict[int, _Table] = {}
        # What each stage passes on, by whether gradients are computed and the class of the micro-batch's shapes.
        self._metas: dict[tuple[bool, int, int], NestedMeta] = {}
        self._shape_classes: list[int] = []
        self._ends = ChannelEnds(mpu, device)
        self.reader = MicroBatchReader(mpu, self._ends.headers)
        self.stopwatch: Stopwatch | None = None
        self.total_weight: Tensor | None = None

    def run(
        self,
        schedule: Schedule,
        data: Iterator[Any] | None,
        *,
        loss_fn: Callable[[Any, Any], Any] | None = None,
        loss_weight: LossWeight | None = None,
        loss_scale: float = 1.0,
        dropout_step: int | None = None,
        observe: Observer | None = None,
    ) -> list[Tensor]:
        """Do this rank's actions of `schedule`, and return each micro-batch's loss on the last stage.

        Args:
            schedule: the table.
            data: yields the micro-batches on the first and the last stage; not read on others.
            loss_fn: called as `loss_fn(outputs, labels)` on the last stage; None where the outputs are the loss.
            loss_weight: weighs the micro-batches of all replicas in their mean; None counts them alike. A loss is then
                returned as its share: the mean of all of them is the weighted mean.
            loss_scale: multiplies the loss before its backward; the gradients are those of the mean over micro-batches
                times this.
            dropout_step: the step that seeds dropout; None in evaluation.
            observe: called on the last stage with each micro-batch's outputs and labels.

        Raises:
            PipekitError: if the data end too soon, or a layer returns what cannot be passed on.
        """
        table = self._read_table(schedule)
        activity = self._mpu.activity
        activity.note("reading the batches of the step")
        step_data = self.reader.read(data, schedule.num_micro_batches)
        self._shape_classes = step_data.shape_classes
        for receiver in self._receivers.values():
            receiver.start()
        for peer, acknowledgements in table.acknowledgements.items():
            self._sender(peer).start(acknowledgements)
        # Evaluations are not timed: what was timed last is a training step.
        stopwatch = self.stopwatch if torch.is_grad_enabled() else None
        run = _Run(self, table, step_data, loss_fn, loss_weight, loss_scale, dropout_step, observe, stopwatch)
        if stopwatch is not None:
            stopwatch.begin()
        confirmed = False
        for operation in table.operations:
            activity.note(operation)
            action = operation.action
            # A gradient that has to be waited for never comes from a rank that has found the data wrong.
            if action.kind != "F" and operation.kind != "post" and not confirmed:
                step_data.confirm()
                confirmed = True
            if operation.kind == "run" and action in table.last_of_stage:
                with self._last_gradients(action.stage, run.weights_of(action)):
                    run.do(operation)
            else:
                run.do(operation)
        activity.note("ending the step")
        if not confirmed:
            step_data.confirm()
        run.finish()
        for sender in self._senders.values():
            sender.drain()
        self.total_weight = run.total_weight
        return run.losses

    def _read_table(self, schedule: Schedule) -> _Table:
        if id(schedule) in self._tables:
            return self._tables[id(schedule)]
        if schedule.placement != self._mpu.placement:
            raise PipekitError(
                f"the schedule {schedule.name} puts its stages on the ranks {schedule.placement}, and the model's are "
                f"on {self._mpu.placement}; build both for the same number of stages and the same placement"
            )
        rank = self._mpu.pipe_rank
        operations = plan_operations(schedule, ahead=0 if has_pairs() else POSTED_AHEAD)[rank]
        last = {action.stage: action for action in schedule.ranks[rank] if action.kind in "BW"}
        # Whether another rank's backward is whole or split decides which of its actions sends the gradient.
        gradients = {
            (operation.action.stage - 1, operation.action.micro_batch): operation.action
            for operation in operations
            if operation.kind == "receive" and operation.action.kind != "F"
        }
        self._tables[id(schedule)] = _Table(
            schedule, operations, plan_acknowledgements(schedule, rank), gradients, frozenset(last.values())
        )
        return self._tables[id(schedule)]

    def _sender(self, peer: int) -> Sender:
        if peer not in self._senders:
            end, header_end = self._ends.to(peer)
            self._senders[peer] = Sender(peer=peer, end=end, header_end=header_end)
        return self._senders[peer]

    def _receiver(self, peer: int) -> Receiver:
        if peer not in self._receivers:
            end, header_end = self._ends.of(peer)
            self._receivers[peer] = Receiver(
                peer=peer,
                end=end,
                header_end=header_end,
                device=self._device,
                find_meta=self._find_meta,
                learn_meta=self._learn_meta,
                may_defer=not has_pairs(),
            )
        return self._receivers[peer]

    def _meta_key(self, stage: int, micro_batch: int) -> tuple[bool, int, int]:
        return torch.is_grad_enabled(), self._shape_classes[micro_batch], stage

    def _find_meta(self, action: Action) -> NestedMeta | None:
        """Shapes and types of an action's result: a stage's outputs, or the gradients of its inputs."""
        if action.kind == "F":
            return self._metas.get(self._meta_key(action.stage, action.micro_batch))
        # A gradient arrives after the activation that it belongs to was sent from here.
        activation = self._metas.get(self._meta_key(action.stage - 1, action.micro_batch))
        if activation is None:
            return None
        return NestedMeta(tuple(tensor for tensor in activation.tensors if tensor.requires_grad), None)

    def _learn_meta(self, action: Action, meta: NestedMeta) -> None:
        self._metas[self._meta_key(action.stage, action.micro_batch)] = meta

    def _send(self, action: Action, tensors: tuple[Tensor, ...], structure: Any, target: int) -> None:
        if action.kind != "F":
            self._sender(target).send(action, tensors)
            return
        meta = NestedMeta(tuple(TensorMeta.of(tensor) for tensor in tensors), structure)
        known = self._metas.setdefault(self._meta_key(action.stage, action.micro_batch), meta)
        if known != meta:
            raise PipekitError(
                f"{name_result(action)} is {meta}, and that of another micro-batch with inputs of the same shape was "
                f"{known}; what a stage passes on must follow from the shapes of the inputs alone: pad it"
            )
        header = encode_meta(meta) if known is meta else None
        self._sender(target).send(action, tensors, header=header)


class _Run:
    """The state of one pass through a schedule."""

    def __init__(
        self,
        executor: Executor,
        table: _Table,
        data: StepData,
        loss_fn: Callable[[Any, Any], Any] | None,
        loss_weight: LossWeight | None,
        loss_scale: float,
        dropout_step: int | None,
        observe: Observer | None,
        stopwatch: Stopwatch | None,
    ) -> None:
        self._executor = executor
        self._schedule = table.schedule
        self._acknowledgements = table.acknowledgements
        self._gradient_of = table.gradient_of
        self._mpu = executor._mpu
        self._view = executor._view
        self._device = executor._device
        self._stopwatch = stopwatch
        # Of all micro-batches at once, so that they are copied at once.
        inputs = [inputs for inputs, _ in data.micro_batches] if self._mpu.is_first_stage else []
        labels = [labels for _, labels in data.micro_batches] if self._mpu.is_last_stage else []
        self._step_inputs, self._step_labels = to_device(inputs, self._device), to_device(labels, self._device)
        self._loss_fn = loss_fn
        self._weights, self.total_weight = self._weigh(loss_weight)
        self._backward_scale = loss_scale / table.schedule.num_micro_batches
        self._dropout_step = dropout_step
        self._observe = observe
        self._in_flight: dict[tuple[int, int], _InFlight] = {}
        self._deferred: dict[tuple[int, int], WeightGradients] = {}
        # What passes between two stages of this rank, by the stage that it is for: no copy, no message.
        self._handed_up: dict[tuple[int, int], Any] = {}
        self._handed_down: dict[tuple[int, int], tuple[Tensor, ...]] = {}
        # What passes between ranks, by the action that it results from, until it is used or sent.
        self._received: dict[Action, tuple[Tensor, ...]] = {}
        self._results: dict[Action, tuple[tuple[Tensor, ...], Any]] = {}
        self.losses: list[Tensor] = []

    def _weigh(self, loss_weight: LossWeight | None) -> tuple[Tensor | None, Tensor | None]:
        """Weight of each micro-batch's loss, of a mean of 1 over all replicas; and the sum of what they count."""
        counts = [None if loss_weight is None else loss_weight(labels) for labels in self._step_labels]
        if not counts or any(count is None for count in counts):
            return None, None
        each = torch.stack([count for count in counts if count is not None]).to(self._device, torch.float64)
        total, dp = each.sum(), self._mpu.layout.dp
        if dp > 1:
            dist.all_reduce(total, group=self._mpu.data.process_group)
        # Of nothing at all, nothing is learned.
        return (each * (len(each) * dp) / total.clamp(min=1e-30)).float(), total

    def do(self, operation: Operation) -> None:
        action, peer = operation.action, operation.peer
        if peer is None:
            if action.kind == "F":
                self._forward(action)
            elif action.kind == "W":
                self._weight_gradients(action)
            else:
                self._backward(action)
        elif operation.kind == "post":
            self._executor._receiver(peer).post(action)
        elif operation.kind == "receive":
            tensors = self._received[action] = self._executor._receiver(peer).receive(action)
            # A message without tensors is never sent, so that it proves nothing.
            if tensors and peer in self._acknowledgements:
                self._executor._sender(peer).release(action)
        else:
            self._executor._send(action, *self._results.pop(action), peer)

    def finish(self) -> None:
        assert not self._in_flight, "a forward was left without its backward"
        assert not self._deferred, "an input gradient was left without its weight gradient"

    def _forward(self, action: Action) -> None:
        inputs = self._inputs(action)
        self._start(action)
        is_last = action.stage == self._schedule.num_stages - 1
        outputs = self._executor._forward(
            inputs,
            stage=action.stage,
            dropout_path=self._dropout_path(action),
            split_backward=(action.stage, action.micro_batch) in self._schedule.split_backwards,
        )
        if is_last:
            outputs = self._loss(outputs, action)
        tensors, structure = flatten(outputs, name_result(action))
        self._stop(action)
        if torch.is_grad_enabled():
            leaves, _ = flatten(inputs, f"the input of {action}")
            self._in_flight[action.stage, action.micro_batch] = _InFlight(
                tuple(leaf for leaf in leaves if leaf.requires_grad),
                tuple(tensor for tensor in tensors if tensor.requires_grad),
            )
        if is_last:
            return
        if self._schedule.placement[action.stage + 1] == self._mpu.pipe_rank:
            passed = [_leaf(tensor.detach(), tensor.requires_grad) for tensor in tensors]
            self._handed_up[action.stage + 1, action.micro_batch] = unflatten(passed, structure)
        else:
            self._results[action] = tensors, structure

    def _inputs(self, action: Action) -> Any:
        stage, micro_batch = action.stage, action.micro_batch
        if stage == 0:
            return self._step_inputs[micro_batch]
        if self._schedule.placement[stage - 1] == self._mpu.pipe_rank:
            return self._handed_up.pop((stage, micro_batch))
        result_of = Action(stage - 1, "F", micro_batch)
        meta = self._executor._find_meta(result_of)
        assert meta is not None
        received = zip(self._received.pop(result_of), meta.tensors, strict=True)
        return unflatten([_leaf(tensor, described.requires_grad) for tensor, described in received], meta.structure)

    def _backward(self, action: Action) -> None:
        flight = self._in_flight[action.stage, action.micro_batch]
        gradients = self._gradients(action, flight)
        self._start(action)
        with deferring() if action.kind == "I" else nullcontext() as deferred:
            if flight.outputs:
                self._executor._backward(flight.outputs, gradients)
        if deferred is not None:
            self._deferred[action.stage, action.micro_batch] = deferred
        self._stop(action)
        del self._in_flight[action.stage, action.micro_batch]
        stage = destination(action, self._schedule)
        if stage is None:
            return
        # A layer may leave an input unused; the stage before waits for its gradient all the same.
        needed = tuple(torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in flight.inputs)
        # A weight gradient that is put off keeps its layer's input, which must not keep what is sent.
        for leaf in flight.inputs:
            leaf.grad = None
        if self._schedule.placement[stage] == self._mpu.pipe_rank:
            self._handed_down[stage, action.micro_batch] = needed
        else:
            self._results[action] = needed, None

    def _gradients(self, action: Action, flight: _InFlight) -> tuple[Tensor, ...]:
        stage = action.stage
        if stage == self._schedule.num_stages - 1:
            return tuple(torch.full_like(tensor, self._backward_scale) for tensor in flight.outputs)
        if self._schedule.placement[stage + 1] == self._mpu.pipe_rank:
            return self._handed_down.pop((stage, action.micro_batch))
        return self._received.pop(self._gradient_of[stage, action.micro_batch])

    def weights_of(self, action: Action) -> list[Tensor] | None:
        """The weights whose gradients a `W` computes; None for a whole backward."""
        return self._deferred[action.stage, action.micro_batch].weights if action.kind == "W" else None

    def _weight_gradients(self, action: Action) -> None:
        self._start(action)
        with torch.no_grad():
            self._deferred.pop((action.stage, action.micro_batch)).compute(self._view.add)
        self._stop(action)

    def _loss(self, outputs: Any, action: Action) -> Any:
        labels = self._step_labels[action.micro_batch]
        loss = outputs if self._loss_fn is None else self._loss_fn(outputs, labels)
        if torch.is_grad_enabled() and (not isinstance(loss, Tensor) or loss.numel() != 1):
            what = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
            raise PipekitError(f"the loss of {action} is {what}; the loss function must return a scalar tensor")
        if self._weights is not None:
            weight = self._weights[action.micro_batch]
            # The mean of no label is nan.
            loss = torch.where(weight > 0, loss * weight, 0.0)
        if isinstance(loss, Tensor) and loss.numel() == 1:
            self.losses.append(loss.detach().float().reshape(()))
        if self._observe is not None:
            self._observe(outputs, labels)
        return loss

    def _dropout_path(self, action: Action) -> tuple[int, int] | None:
        if self._dropout_step is None:
            return None
        # The index within the global batch: the same micro-batch draws the same masks under every layout.
        return self._dropout_step, self._mpu.data_parallel_rank * self._schedule.num_micro_batches + action.micro_batch

    def _start(self, action: Action) -> None:
        if self._stopwatch is not None:
            self._stopwatch.start(action)

    def _stop(self, action: Action) -> None:
        if self._stopwatch is not None:
            self._stopwatch.stop(action)


def _leaf(tensor: Tensor, requires_grad: bool) -> Tensor:
    leaf: Tensor = tensor.requires_grad_(requires_grad and torch.is_grad_enabled())
    return leaf
