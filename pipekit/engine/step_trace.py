"""Trace of a step: what each layer computes of each micro-batch, seen by hooks, and the first of it that is wrong.

A step that has gone wrong is computed again from the same state, with hooks, and without an update. Ordinary steps have
no hooks, and cost nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from pipekit.distributed.processes import gather_objects
from pipekit.engine.module import PipelineModule
from pipekit.engine.stopwatch import Stopwatch
from pipekit.engine.training_engine import TrainingEngine
from pipekit.schedules import Action
from pipekit.tensor_parallel import Logits
from pipekit.tensors.nested import map_tensors

Kind = Literal["weight", "activation", "gradient"]

Probe = Callable[[Tensor, bool], Tensor]
"""Looks at a tensor on its device, and returns a small tensor of what it has found, always of the same shape. Its
second argument is False where no gradient flows through the tensor."""


@dataclass(frozen=True)
class Place:
    """Place of a tensor in the computation of a step on one rank.

    Attributes:
        kind: of the tensor.
        micro_batch: of its replica, from 0; None for a weight, which is there before the step.
        layer_idx: of the layer; the number of layers for the loss.
        layer: its name, as in checkpoints; `the loss` for the loss.
        what: the tensor in words, such as `the output of blocks.0.mlp`.
        order: number of tensors of this layer and micro-batch that were computed before it, forward or backward.
        is_inner: True for what a part of the layer returns, and not the layer.
    """

    kind: Kind
    micro_batch: int | None
    layer_idx: int
    layer: str
    what: str
    order: int
    is_inner: bool = False

    @property
    def stretch(self) -> tuple[int, int, int]:
        """Place of its layer's forward or backward in the order of the computation; forwards count up the layers."""
        if self.micro_batch is None:
            return -1, 0, self.layer_idx
        return self.micro_batch, *((1, -self.layer_idx) if self.kind == "gradient" else (0, self.layer_idx))


@dataclass(frozen=True)
class Fault:
    """A tensor of a step that is wrong.

    Attributes:
        place: where in the computation.
        rank: the global rank that has it.
        stage: the stage of the layer.
        replica: the data-parallel rank.
    """

    place: Place
    rank: int
    stage: int
    replica: int

    def __str__(self) -> str:
        when = "" if self.place.micro_batch is None else f", in micro-batch {self.place.micro_batch}"
        return f"{self.place.what}, on rank {self.rank} (stage {self.stage}){when}"


def find_first(faults: Sequence[Fault]) -> Fault | None:
    """The first of the tensors that are wrong on any rank, in the order of the computation.

    Weights come first. Then the micro-batches count, each by its forward, from the first layer to the last, and its
    backward, from the loss to the first layer. That decides on the layer. Within it the tensor counts that its rank has
    computed first, parts of the layer included: tensor-parallel ranks share what they compute at the end of a layer.

    Args:
        faults: of all ranks.

    Example:
        >>> def fault(rank, layer_idx, name, order, is_inner=False):
        ...     place = Place("activation", 0, layer_idx, name, f"the output of {name}", order, is_inner)
        ...     return Fault(place, rank, stage=0, replica=0)
        >>> outputs = [fault(rank, 1, "blocks.1", 9) for rank in (0, 1)]
        >>> print(find_first([fault(0, 2, "blocks.2", 9), *outputs, fault(1, 1, "blocks.1.up", 4, True)]))
        the output of blocks.1.up, on rank 1 (stage 0), in micro-batch 0
    """
    if not faults:
        return None
    # A part may hold what is infinite on purpose, such as scores that are masked, where nothing follows from it.
    outer = [fault for fault in faults if not fault.place.is_inner] or faults
    first = min(outer, key=_stretch)
    return min(
        (each for each in faults if _stretch(each) == _stretch(first)), key=lambda each: (each.place.order, each.rank)
    )


def is_nonfinite(tensor: Tensor, has_gradient: bool = True) -> Tensor:
    """Probe: True, of shape `()`, if a tensor holds a NaN or an infinity; a mask, without a gradient, may be infinite.

    Example:
        >>> bool(is_nonfinite(torch.tensor([1.0, float("nan")])))
        True
        >>> mask = torch.tensor([0.0, float("-inf")])
        >>> bool(is_nonfinite(mask)), bool(is_nonfinite(mask, has_gradient=False))
        (True, False)
    """
    values = tensor.detach()
    return (~values.isfinite() if has_gradient else values.isnan()).any()


class StepTrace:
    """Findings of a probe in the tensors of a step on this rank.

    Args:
        engine: whose steps are traced.
        probe: looks at each tensor.
        with_parts: whether it also looks at what parts of layers return. Compiled layers then run uncompiled.
    """

    def __init__(self, engine: TrainingEngine, probe: Probe, *, with_parts: bool) -> None:
        self._engine, self._probe, self._with_parts = engine, probe, with_parts
        self._module: PipelineModule = engine.module
        self._found: dict[Place, Tensor] = {}
        self._seen: set[tuple[Any, ...]] = set()
        self._orders: dict[tuple[int, int, int], int] = {}
        self._marks = _Marks(engine.device)
        self._layer_idx = 0

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Look at what is computed inside."""
        module, executor = self._module, self._engine.executor
        layers, loss_fn, stopwatch = dict(module._layers), module.loss_fn, executor.stopwatch
        with ExitStack() as stack:
            executor.stopwatch = self._marks
            stack.callback(setattr, executor, "stopwatch", stopwatch)
            stack.callback(module._layers.update, layers)
            module._layers.update({idx: partial(self._run_layer, idx, layer) for idx, layer in layers.items()})
            if loss_fn is not None:
                module.loss_fn = partial(self._run_loss, loss_fn)
                stack.callback(setattr, module, "loss_fn", loss_fn)
            for layer_idx, name, parameter in named_parameters(module):
                if parameter.requires_grad:
                    # A weight with a hook gets its gradient in the backward, under every schedule.
                    what = f"the gradient of {module.layer_names[layer_idx]}.{name}"
                    look = partial(self._look_at_gradient, layer_idx, what, False)
                    stack.callback(parameter.register_hook(look).remove)  # type: ignore[no-untyped-call]
            if self._with_parts:
                for name, part in _parts(module):
                    stack.callback(part.register_forward_hook(partial(self._look_at_part, name)).remove)
                for each in module.modules():
                    if each._compiled_call_impl is not None:
                        stack.callback(setattr, each, "_compiled_call_impl", each._compiled_call_impl)
                        each._compiled_call_impl = None
            yield

    def results(self) -> dict[Place, Any]:
        """Findings of the probe, by place, in the order in which this rank has computed it; waits for the device."""
        if not self._found:
            return {}
        # One transfer for all of them; each would wait for the device.
        return dict(zip(self._found, torch.stack(list(self._found.values())).tolist(), strict=True))

    def _run_layer(self, layer_idx: int, layer: Callable[[Any], Any], inputs: Any) -> Any:
        self._layer_idx = layer_idx
        name = self._module.layer_names[layer_idx]
        self._look(layer_idx, f"the input of {name}", inputs)
        outputs = layer(inputs)
        self._look(layer_idx, f"the output of {name}", outputs)
        return outputs

    def _run_loss(self, loss_fn: Callable[[Any, Any], Any], outputs: Any, labels: Any) -> Any:
        loss = loss_fn(outputs, labels)
        self._look(len(self._module.layer_names), "the loss", loss)
        return loss

    def _look_at_part(self, name: str, part: nn.Module, inputs: Any, outputs: Any) -> None:
        layer = self._module.layer_names[self._layer_idx]
        self._look(self._layer_idx, f"the output of {layer}.{name}", outputs, is_inner=True)

    def _look(self, layer_idx: int, what: str, value: Any, *, is_inner: bool = False) -> None:
        tensors: list[Tensor] = []
        map_tensors(tensors.append, value.hidden if isinstance(value, Logits) else value)
        for place, tensor in enumerate(tensors):
            if not tensor.is_floating_point():
                continue
            named = what if len(tensors) == 1 else f"tensor {place} of {what}"
            is_new = self._note("activation", layer_idx, named, tensor, is_inner)
            # What is checkpointed is computed again in the backward, whose gradients go the way of the first time.
            if is_new and tensor.requires_grad:
                look = partial(self._look_at_gradient, layer_idx, f"the gradient of {named}", is_inner)
                tensor.register_hook(look)  # type: ignore[no-untyped-call]

    def _look_at_gradient(self, layer_idx: int, what: str, is_inner: bool, gradient: Tensor) -> None:
        values = gradient._values() if gradient.is_sparse else gradient
        self._note("gradient", layer_idx, what, values, is_inner)

    def _note(self, kind: Kind, layer_idx: int, what: str, tensor: Tensor, is_inner: bool) -> bool:
        """Note what the probe finds in a tensor; return whether it is seen for the first time."""
        assert self._marks.action is not None
        micro_batch = self._marks.action.micro_batch
        if (micro_batch, layer_idx, what) in self._seen:
            return False
        self._seen.add((micro_batch, layer_idx, what))
        layer = [*self._module.layer_names, "the loss"][layer_idx]
        stretch = Place(kind, micro_batch, layer_idx, layer, what, 0).stretch
        order = self._orders[stretch] = self._orders.get(stretch, -1) + 1
        self._found[Place(kind, micro_batch, layer_idx, layer, what, order, is_inner)] = self._probe(
            tensor.detach(), kind == "gradient" or tensor.requires_grad
        )
        return True


class _Marks(Stopwatch):
    """A stopwatch that knows the action that is under way."""

    action: Action | None = None

    def start(self, action: Action) -> None:
        super().start(action)
        self.action = action


def named_parameters(module: PipelineModule) -> Iterator[tuple[int, str, nn.Parameter]]:
    """Yield each parameter of this rank once, with the index of its first layer here, and its name in that layer."""
    seen: set[str] = set()
    for layer_idx in module.layer_indices:
        if module.layer_names[layer_idx] not in seen:
            seen.add(module.layer_names[layer_idx])
            for name, parameter in module.module_of(layer_idx).named_parameters():
                yield layer_idx, name, parameter


def _parts(module: PipelineModule) -> Iterator[tuple[str, nn.Module]]:
    """Yield the modules inside of layers, once each, with their names in their layers."""
    for layer in dict.fromkeys(module.module_of(layer_idx) for layer_idx in module.layer_indices):
        yield from ((name, part) for name, part in layer.named_modules() if name)


def _stage_of(module: PipelineModule, layer_idx: int) -> int:
    last = len(module.layer_names) - 1
    return next(stage for stage in module.stages if min(layer_idx, last) in module.layers_of(stage))


def gather_first(engine: TrainingEngine, places: Sequence[Place]) -> Fault | None:
    """Return the first fault of all ranks, each of which gives its places. Every rank calls this together."""
    mpu, module = engine.mpu, engine.module
    own = [Fault(each, mpu.global_rank, _stage_of(module, each.layer_idx), mpu.data_parallel_rank) for each in places]
    # First what decides on the layer, one for each rank; then all that belongs to it.
    outer = [fault for fault in own if not fault.place.is_inner] or own
    earliest = find_first(_gather_lists(outer[:1] and [min(outer, key=_stretch)]))
    return earliest and find_first(_gather_lists([each for each in own if _stretch(each) == _stretch(earliest)]))


def _gather_lists(faults: list[Fault]) -> list[Fault]:
    return [fault for some in gather_objects(faults) for fault in some]


def _stretch(fault: Fault) -> tuple[tuple[int, int, int], int]:
    return fault.place.stretch, fault.replica


def _held(parameter: Tensor, replica: int) -> Tensor:
    """Part of a parameter that a rank holds: a piece under ZeRO-3, of which the last may be filled up with anything."""
    if not hasattr(parameter, "ds_tensor"):
        return parameter
    piece: Tensor = parameter.ds_tensor
    return piece[: max(0, int(parameter.ds_numel) - replica * piece.numel())]  # type: ignore[attr-defined]


def find_bad_weight(engine: TrainingEngine) -> Fault | None:
    """Return the first weight that is not finite on any rank. Every rank calls this together."""
    module: PipelineModule = engine.module
    found: dict[Place, Tensor] = {}
    for layer_idx, name, parameter in named_parameters(module):
        layer = module.layer_names[layer_idx]
        place = Place("weight", None, layer_idx, layer, f"the weight {layer}.{name}", len(found))
        found[place] = is_nonfinite(_held(parameter, engine.mpu.data_parallel_rank))
    wrong = torch.stack(list(found.values())).tolist() if found else []
    return gather_first(engine, [place for place, is_wrong in zip(found, wrong, strict=True) if is_wrong])


@dataclass(frozen=True)
class Diagnosis:
    """Outcome of computing a step again.

    Attributes:
        fault: the first tensor that is not finite; None where all are finite this time.
        norm_is_finite: False where the norm of the gradient is not finite, though every number of the gradient is.
    """

    fault: Fault | None
    norm_is_finite: bool = True


def diagnose_step(engine: TrainingEngine, data: Callable[[], Any], *, step: int) -> Diagnosis | None:
    """Find the first number that is not finite in a step whose update was left out. Every rank calls this together.

    The step is computed again from the same state, except where a weight is not finite already, which is named at once.

    Args:
        engine: which has just left out the update of the step.
        data: returns the step's data anew, as `train_batch` takes them.
        step: number of the step, from 0.

    Returns:
        What was found; None where all weights are finite, and the engine cannot compute a step again.
    """
    fault = find_bad_weight(engine)
    if fault is not None:
        return Diagnosis(fault)
    if not engine.can_compute_again:
        return None
    trace = StepTrace(engine, is_nonfinite, with_parts=True)
    with engine.computing_again(step), trace.watching():
        engine.train_batch(data())
    fault = gather_first(engine, [place for place, is_wrong in trace.results().items() if is_wrong])
    norm = engine.view.norm
    return Diagnosis(fault, norm_is_finite=norm is None or bool(norm.isfinite()))
