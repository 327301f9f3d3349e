"""Recording of activations between layers, and of their gradients."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor

from pipekit.tensor_parallel.logits import whole_outputs
from pipekit.tensor_parallel.shards import Shard
from pipekit.tensors.nested import flatten
from pipekit.verify.recording import Recorder, TensorKey

OutputShard = Callable[[int, Tensor], Shard | None]
"""Returns the shard of a layer's output that a rank has, given the layer's index and the tensor."""


class ActivationRecorder:
    """Records the outputs of layers and the gradients of their inputs, micro-batch by micro-batch.

    A gradient is recorded as that of the micro-batch's own loss, which is `num_micro_batches` times its contribution to
    the step's. `shard_of_output` returns the shard of an output that is here; all of it is, unless given.
    """

    def __init__(
        self,
        recorder: Recorder,
        *,
        num_micro_batches: int,
        shard_of_output: OutputShard = lambda layer_idx, tensor: None,
    ) -> None:
        self._recorder = recorder
        self._num_micro_batches = num_micro_batches
        self._shard_of_output = shard_of_output
        self._seen: set[TensorKey] = set()

    def __call__(self, layer_idx: int, outputs: Any, path: tuple[int, int] | None) -> None:
        """Record what a layer has returned; `path` is the step and the index of the micro-batch."""
        assert path is not None, "evaluations are not recorded"
        step, micro_batch = path
        tensors, _ = flatten(whole_outputs(outputs), f"the output of layer {layer_idx}")
        for place, tensor in enumerate(tensors):
            name = "" if len(tensors) == 1 else f"[{place}]"
            key = TensorKey("output", step, layer_idx, name, micro_batch)
            # What is checkpointed is computed again in the backward.
            if key in self._seen:
                continue
            self._seen.add(key)
            shard = self._shard_of_output(layer_idx, tensor)
            self._recorder.write(key, tensor, shard=shard)
            if tensor.requires_grad:
                passed_back = TensorKey("input gradient", step, layer_idx + 1, name, micro_batch)
                tensor.register_hook(partial(self._write_gradient, passed_back, shard))  # type: ignore[no-untyped-call]

    def _write_gradient(self, key: TensorKey, shard: Shard | None, gradient: Tensor) -> None:
        self._recorder.write(key, gradient * self._num_micro_batches, shard=shard)
