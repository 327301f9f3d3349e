"""Floating-point operations of a step by layer, as torch's counter counts them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, Literal

from torch import Tensor, nn

from pipekit.engine.training_engine import TrainingEngine
from pipekit.schedules.operations import Operation
from pipekit.tensor_parallel import Logits
from pipekit.tensors.flop_counter import make_flop_counter
from pipekit.tensors.nested import map_tensors

Phase = Literal["forward", "backward", "recomputed"]

LayerFlops = dict[str, dict[str, int]]
"""Operations by the name of the layer, and by phase."""


class LayerFlopCounter:
    """Counts the operations of this rank's layers in a step: matrix products, convolutions and attention.

    What is computed again under activation checkpointing of whole layers is counted by itself. Compiled layers run
    uncompiled meanwhile. The loss counts as part of the last layer.

    Args:
        engine: whose steps are counted.
    """

    def __init__(self, engine: TrainingEngine) -> None:
        self._engine = engine
        self._counter = make_flop_counter()
        self._counted = 0
        self._owner: tuple[int, Phase] | None = None
        self._is_backward = False
        self._sums: defaultdict[tuple[int, Phase], int] = defaultdict(int)

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Count a step, which runs inside."""
        engine, module, activity = self._engine, self._engine.module, self._engine.mpu.activity
        layers, add, observer = dict(module._layers), engine.view.add, activity.observer
        owners = {
            id(parameter): layer_idx
            for layer_idx in reversed(module.layer_indices)
            for parameter in module.module_of(layer_idx).parameters()
        }
        with ExitStack() as stack:
            stack.callback(module._layers.update, layers)
            module._layers.update({idx: partial(self._run_layer, idx, layer) for idx, layer in layers.items()})
            for each in module.modules():
                if each._compiled_call_impl is not None:
                    stack.callback(setattr, each, "_compiled_call_impl", each._compiled_call_impl)
                    each._compiled_call_impl = None
            stack.callback(vars(engine.view).pop, "add", None)
            engine.view.add = partial(self._add, add, owners)  # type: ignore[method-assign]
            stack.callback(setattr, activity, "observer", observer)
            activity.observer = self._begin
            stack.enter_context(self._counter)
            yield
            self._own(None)

    def results(self) -> LayerFlops:
        """Operations of each layer of this rank by phase."""
        found: LayerFlops = {}
        for (layer_idx, phase), flops in sorted(self._sums.items()):
            if flops:
                found.setdefault(self._engine.module.layer_names[layer_idx], {})[phase] = flops
        return found

    def _begin(self, doing: Operation | str) -> None:
        if isinstance(doing, str) or doing.kind != "run":
            return
        stage, kind = doing.action.stage, doing.action.kind
        self._is_backward = kind != "F"
        # The loss, and what converts a stage's output, belong to its last layer.
        self._own((self._engine.module.layers_of(stage)[-1], "backward" if self._is_backward else "forward"))

    def _own(self, owner: tuple[int, Phase] | None) -> None:
        """Give what was counted since the last call to its owner, and name the next."""
        total = self._counter.get_total_flops()
        if self._owner is not None:
            self._sums[self._owner] += total - self._counted
        self._counted, self._owner = total, owner

    def _run_layer(self, layer_idx: int, layer: Callable[[Any], Any], inputs: Any) -> Any:
        if self._is_backward:
            self._own((layer_idx, "recomputed"))
            try:
                return layer(inputs)
            finally:
                # Torch ends a recomputation by an exception, when it has what it needs.
                self._own((layer_idx, "backward"))
        self._own((layer_idx, "forward"))
        outputs = layer(inputs)

        def begin_backward(gradient: Tensor) -> None:
            self._own((layer_idx, "backward"))

        def look(tensor: Tensor) -> Tensor:
            if tensor.requires_grad:
                tensor.register_hook(begin_backward)  # type: ignore[no-untyped-call]
            return tensor

        map_tensors(look, outputs.hidden if isinstance(outputs, Logits) else outputs)
        return outputs

    def _add(self, add: Callable[..., None], owners: dict[int, int], weight: nn.Parameter, compute: Any) -> None:
        """Compute a deferred weight gradient, which belongs to the layer of its weight."""
        self._own((owners[id(weight)], "backward"))
        add(weight, compute)
