"""Recording what passes between layers: what each returns, and what the next one passes back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from pipekit.tensor_parallel.logits import whole_outputs
from pipekit.tensor_parallel.shards import Shard
from pipekit.tensors.nested import flatten
from pipekit.verify.recording import Key, Recorder

ShardOf = Callable[[int, Tensor], Shard | None]
"""Returns which part of a layer's output a rank has, given the layer's index and what it returned there."""


class FlowObserver:
    """Records the outputs of layers and the gradients of their inputs, micro-batch by micro-batch.

    Args:
        recorder: where to.
        num_micro_batches: of a step in this process. A gradient is recorded as that of the micro-batch's own loss,
            which is this many times its part in the step's.
        shard_of_output: returns which part of an output is here; all of it unless given.
    """

    def __init__(
        self,
        recorder: Recorder,
        *,
        num_micro_batches: int,
        shard_of_output: ShardOf = lambda layer_idx, tensor: None,
    ) -> None:
        self._recorder = recorder
        self._num_micro_batches = num_micro_batches
        self._shard_of_output = shard_of_output
        self._seen: set[Key] = set()

    def __call__(self, layer_idx: int, outputs: Any, path: tuple[int, int] | None) -> None:
        """Record what a layer has returned; `path` is the step and the index of the micro-batch."""
        assert path is not None, "evaluations are not observed"
        step, micro_batch = path
        tensors, _ = flatten(whole_outputs(outputs), f"the output of layer {layer_idx}")
        for place, tensor in enumerate(tensors):
            name = "" if len(tensors) == 1 else f"[{place}]"
            key = Key("output", step, layer_idx, name, micro_batch)
            # What is checkpointed is computed again in the backward.
            if key in self._seen:
                continue
            self._seen.add(key)
            shard = self._shard_of_output(layer_idx, tensor)
            self._recorder.write(key, tensor, shard=shard)
            if tensor.requires_grad:
                self._observe_gradient(Key("input gradient", step, layer_idx + 1, name, micro_batch), tensor, shard)

    def _observe_gradient(self, key: Key, tensor: Tensor, shard: Shard | None) -> None:
        def write(gradient: Tensor) -> None:
            self._recorder.write(key, gradient * self._num_micro_batches, shard=shard)

        tensor.register_hook(write)  # type: ignore[no-untyped-call]
