"""Generator over several processes: each has a stage of the model's layers, and its tensor-parallel shards of them."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from pipekit.distributed.mpu import ModelParallelUnit
from pipekit.distributed.processes import gather_objects, run_together, wait
from pipekit.engine.channels import HEADER_BYTES, decode_meta, encode_meta
from pipekit.engine.tensor_group import ProcessTensorGroup
from pipekit.inference.generator import Generator
from pipekit.inference.language_model import LanguageModel
from pipekit.inference.load_model import StoredModel
from pipekit.tensors.meta import NestedMeta, TensorMeta
from pipekit.tensors.nested import flatten, unflatten


def open_on_ranks(stored: StoredModel, mpu: ModelParallelUnit, device: torch.device) -> Generator:
    """Open a model on all ranks of a layout without replicas, which call this together.

    Each rank reads its own layers, and of them its own shards, and no more.

    Raises:
        PipekitError: on every rank, if one cannot read its part.
    """
    layers = stored.cut(pp=mpu.layout.pp, tp=mpu.layout.tp)[mpu.coordinate.pipe]
    group = ProcessTensorGroup(mpu.tensor) if mpu.layout.tp > 1 else None
    model = run_together(lambda: stored.build(layers=layers, group=group).to(device))
    link = ProcessStageLink(mpu, device)
    language_model = LanguageModel(model, longest_sequence=stored.longest_sequence, device=device, link=link)
    return Generator(language_model, stored)


class ProcessStageLink:
    """Messages of a forward between the stages of a model, each in processes of its own.

    What passes on has a shape that follows from that of the token ids, so that it is told once for each of these.

    Args:
        mpu: the process groups.
        device: of this rank.

    Attributes:
        is_first: True if this process has the first layers.
        is_last: True if it has the last.
    """

    def __init__(self, mpu: ModelParallelUnit, device: torch.device) -> None:
        self._device, self._mpu, layout = device, mpu, mpu.layout
        stage, tensor = mpu.coordinate.pipe, mpu.coordinate.tensor
        self.is_first, self.is_last = stage == 0, stage == layout.pp - 1
        self._before = None if self.is_first else layout.rank(pipe=stage - 1, tensor=tensor)
        self._behind = None if self.is_last else layout.rank(pipe=stage + 1, tensor=tensor)
        self._source = layout.rank(pipe=layout.pp - 1, tensor=0)
        self._described: dict[Hashable, NestedMeta] = {}
        self._shared: dict[Hashable, TensorMeta] = {}

    def receive(self, key: Hashable) -> Any:
        """Activations from the stage before; `key` is the same for all that have these shapes."""
        assert self._before is not None
        what = f"what pipeline rank {self._mpu.coordinate.pipe - 1} passes on"
        if key not in self._described:
            header = torch.empty(HEADER_BYTES, dtype=torch.uint8, device=self._device)
            _wait(dist.irecv(header, self._before), what)
            self._described[key] = decode_meta(header.cpu())
        meta = self._described[key]
        received = [tensor.empty(self._device) for tensor in meta.tensors]
        for tensor in received:
            _wait(dist.irecv(tensor, self._before), what)
        return unflatten(received, meta.structure)

    def send(self, activations: Any, key: Hashable) -> None:
        """Send activations to the next stage."""
        assert self._behind is not None
        what = f"pipeline rank {self._mpu.coordinate.pipe + 1} to receive activations"
        if key not in self._described:
            self._described[key] = NestedMeta.of(activations, "the output of a layer")
            _wait(dist.isend(encode_meta(self._described[key]).to(self._device), self._behind), what)
        for tensor in flatten(activations, "the output of a layer")[0]:
            _wait(dist.isend(tensor.contiguous(), self._behind), what)

    def share(self, logits: Tensor | None, key: Hashable) -> Tensor:
        """Logits of the last stage, on every rank: bit by bit the same, so that all draw the same tokens."""
        if key not in self._shared:
            own = None if logits is None else NestedMeta.of(logits, "the output of the model")
            header = torch.empty(HEADER_BYTES, dtype=torch.uint8) if own is None else encode_meta(own)
            header = header.to(self._device)
            self._broadcast(header)
            self._shared[key] = decode_meta(header.cpu()).tensors[0]
        result = self._shared[key].empty(self._device) if logits is None else logits.contiguous()
        self._broadcast(result)
        return result

    def _broadcast(self, tensor: Tensor) -> None:
        _wait(dist.broadcast(tensor, self._source, async_op=True), "the logits of the last stage")

    def all_agree(self, value: bool) -> bool:
        """True if the value is true on every rank."""
        return all(gather_objects(value))


def _wait(work: dist.Work | None, what: str) -> None:
    assert work is not None
    wait(work, what)
