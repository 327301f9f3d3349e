"""Inputs of recomputed layers: kept whole, as each tensor-parallel rank's shard, or in host memory.

Source: Rajbhandari et al. 2020, "ZeRO: Memory Optimizations Toward Training Trillion Parameter Models", section 6.1.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from pipekit.tensor_parallel.group import TensorGroup
from pipekit.tensors.nested import flatten, unflatten


class KeptInputs:
    """Runner of layers that are recomputed in the backward; it keeps their inputs.

    Args:
        group: ranks that hold equal inputs, each of which keeps a shard; None keeps whole inputs.
        offload: whether to keep inputs in host memory.

    Attributes:
        group: as given.
        offload: as given.
    """

    def __init__(self, group: TensorGroup | None = None, *, offload: bool = False) -> None:
        self.group, self.offload = group, offload
        self._stream: torch.cuda.Stream | None = None
        self._last: weakref.ref[HostCopy] | None = None

    def begin(self) -> None:
        """Begin another forward, whose inputs are kept for its own backward."""
        self._last = None

    def run(
        self, layers: Callable[[Any], Any], inputs: Any, *, is_shard: bool, is_held: bool, preserve_rng_state: bool
    ) -> Any:
        """Run layers that are recomputed in the backward.

        Args:
            layers: called with the inputs.
            inputs: nested tensors.
            is_shard: whether the inputs are already this rank's shards.
            is_held: whether the inputs stay on the device in any case, as a stage's inputs do.
            preserve_rng_state: whether the recomputation draws the same random numbers from the generators.
        """
        again = partial(checkpoint, use_reentrant=False, preserve_rng_state=preserve_rng_state)
        group = None if is_shard else self.group
        if is_held or not (group or self.offload):
            return again(layers, inputs)
        # Of nested tensors, those alone that are arguments of their own pass the hooks.
        tensors, structure = flatten(inputs, "the input of a layer")
        with saved_tensors_hooks(partial(self._pack, group), _unpack):
            return again(lambda *leaves: layers(unflatten(leaves, structure)), *tensors)

    def _pack(self, group: TensorGroup | None, tensor: Tensor) -> Tensor | KeptInput:
        if not tensor.is_floating_point() or isinstance(tensor, nn.Parameter):
            return tensor
        piece, shape = tensor.detach(), tensor.shape
        if group is not None and tensor.numel() % group.size:
            group = None
        if group is not None:
            piece = piece.reshape(-1).chunk(group.size)[group.rank]
        if not self.offload:
            return KeptInput(piece if group is None else piece.clone(), group, shape)
        copy = HostCopy(piece, before=self._last, stream=self._side_stream(tensor.device))
        self._last = weakref.ref(copy)
        return KeptInput(copy, group, shape)

    def _side_stream(self, device: torch.device) -> torch.cuda.Stream | None:
        if device.type == "cuda" and self._stream is None:
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        return self._stream


@dataclass(frozen=True)
class KeptInput:
    """Kept input of a layer, or this rank's shard of it, on the device or in host memory.

    Attributes:
        piece: the tensor that is kept.
        group: the ranks that each have a shard; None if the input is kept whole.
        shape: shape of the whole input.
    """

    piece: Tensor | HostCopy
    group: TensorGroup | None
    shape: torch.Size

    def whole(self) -> Tensor:
        """The input on its device, gathered where it is sharded."""
        tensor = self.piece if isinstance(self.piece, Tensor) else self.piece.take()
        return tensor if self.group is None else self.group.all_gather(tensor, 0).view(self.shape)


def _unpack(kept: Tensor | KeptInput) -> Tensor:
    return kept if isinstance(kept, Tensor) else kept.whole()


class HostCopy:
    """A tensor's copy in host memory; for a GPU it is pinned, and both copies overlap with the computation.

    Args:
        tensor: the tensor.
        before: the copy that is needed after this one; its copy back starts when this one's ends.
        stream: the GPU's stream for copies; None on a CPU.
    """

    def __init__(
        self, tensor: Tensor, *, before: weakref.ref[HostCopy] | None, stream: torch.cuda.Stream | None
    ) -> None:
        self._device, self._before, self._stream = tensor.device, before, stream
        self.host = torch.empty_like(tensor, device="cpu", pin_memory=stream is not None)
        self._fetched: tuple[Tensor, torch.cuda.Event] | None = None
        if stream is None:
            self.host.copy_(tensor)
            return
        stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(stream):
            self.host.copy_(tensor, non_blocking=True)
        # Its memory is not used again before the copy is done.
        tensor.record_stream(stream)

    def take(self) -> Tensor:
        """Return the tensor, copied back to its device."""
        if self._stream is None:
            return self.host
        self._fetch()
        assert self._fetched is not None
        (tensor, is_there), self._fetched = self._fetched, None
        # A layer that has nothing to recompute has let go of its input.
        before = None if self._before is None else self._before()
        if before is not None:
            before._fetch()
        current = torch.cuda.current_stream(self._device)
        current.wait_event(is_there)
        tensor.record_stream(current)
        return tensor

    def _fetch(self) -> None:
        if self._fetched is not None:
            return
        with torch.cuda.stream(self._stream):
            tensor = self.host.to(self._device, non_blocking=True)
            is_there = torch.cuda.Event()  # type: ignore[no-untyped-call]
            is_there.record(self._stream)
        self._fetched = tensor, is_there
