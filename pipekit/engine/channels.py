"""Channels between pipeline ranks: receives posted early, sends that do not wait.

A channel carries all messages of one rank to one other, activations and gradients, in the order in which the sender's
row of the schedule makes them; `pipekit.schedules.operations` says when each is posted and sent.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from pipekit.distributed.processes import wait
from pipekit.errors import PipekitError
from pipekit.schedules import Action
from pipekit.schedules.acknowledgements import Acknowledgements
from pipekit.schedules.messages import name_result
from pipekit.tensors.meta import NestedMeta, TensorMeta

_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2,
        torch.complex64, torch.complex128, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool,
    )
}  # fmt: skip
HEADER_BYTES = 16_384


def encode_meta(meta: NestedMeta) -> Tensor:
    """Return a message's description as a tensor of bytes, of one length for every message.

    Raises:
        PipekitError: if it is too long, or holds a dtype that cannot be sent.
    """
    tensors = []
    for tensor in meta.tensors:
        dtype = str(tensor.dtype).removeprefix("torch.")
        if dtype not in _DTYPES:
            raise PipekitError(f"a stage passes a tensor of {tensor.dtype} on, which cannot be sent; convert it")
        tensors.append([dtype, tensor.requires_grad, *tensor.shape])
    text = json.dumps([tensors, meta.structure]).encode()
    if len(text) > HEADER_BYTES:
        raise PipekitError(
            f"a stage passes {len(meta.tensors)} tensors on, and their description takes {len(text)} bytes where "
            f"{HEADER_BYTES} fit; pass fewer tensors between layers"
        )
    return torch.frombuffer(bytearray(text.ljust(HEADER_BYTES)), dtype=torch.uint8)


def decode_meta(header: Tensor) -> NestedMeta:
    """Inverse of `encode_meta`."""
    tensors, structure = json.loads(header.numpy().tobytes())
    metas = tuple(TensorMeta(tuple(shape), _DTYPES[dtype], grad) for dtype, grad, *shape in tensors)
    return NestedMeta(metas, structure)


@dataclass(frozen=True)
class End:
    """The other end of a channel, as a process group sees it.

    Attributes:
        group: the process group.
        index: index of the other rank in it.
    """

    group: dist.ProcessGroup
    index: int

    def send(self, tensor: Tensor) -> dist.Work:
        """Begin to send, as `dist.isend` does after checks that cost as much as a message."""
        return self.group.send([torch.view_as_real(tensor) if tensor.is_complex() else tensor], self.index, 0)

    def receive(self, tensor: Tensor) -> dist.Work:
        """Begin to receive, as `dist.irecv` does."""
        return self.group.recv([torch.view_as_real(tensor) if tensor.is_complex() else tensor], self.index, 0)


@dataclass(frozen=True)
class _Sent:
    """A message that is on its way, for all that is known; its buffers must outlive it."""

    works: list[dist.Work]
    buffers: tuple[Tensor, ...]


class Sender:
    """The sending end of a channel.

    What was sent is kept until it has arrived. NCCL tells when that is, gloo does not: there a send is known to have
    arrived when the receiver answers with something that it does later.

    Args:
        peer: pipeline rank of the receiver.
        end: the receiver, for tensors.
        header_end: the receiver on CPUs, for their descriptions.
    """

    def __init__(self, *, peer: int, end: End, header_end: End) -> None:
        self._peer = peer
        self._end = end
        self._header_end = header_end
        # By step and action, in the order of sending: a step that failed may have left some behind.
        self._pending: dict[tuple[int, Action], _Sent] = {}
        self._step = 0
        self._acknowledgements = Acknowledgements((), {})
        self._num_received = 0

    def start(self, acknowledgements: Acknowledgements) -> None:
        """Begin a step whose `acknowledgements` are these."""
        self._step += 1
        self._acknowledgements = acknowledgements
        self._num_received = 0

    def send(self, action: Action, tensors: Sequence[Tensor], *, header: Tensor | None = None) -> None:
        """Send an action's result without waiting for it to arrive, after its description where that is new.

        Args:
            action: the action.
            tensors: its result.
            header: what `encode_meta` made of it, if the receiver lacks it.
        """
        buffers = tuple(tensor.detach().contiguous() for tensor in tensors)
        works = []
        if header is not None:
            works.append(self._header_end.send(header))
        works += [self._end.send(buffer) for buffer in buffers]
        self._pending[self._step, action] = _Sent(works, buffers if header is None else (*buffers, header))
        while self._pending:
            oldest = next(iter(self._pending))
            if not all(work.is_completed() for work in self._pending[oldest].works):
                return
            del self._pending[oldest]

    def release(self, answer: Action) -> None:
        """Drop what the receiver has for certain, now that the result of `answer` has arrived from it."""
        num_received = self._acknowledgements.confirmed.get(answer, 0)
        # Waiting takes no time where the message is received, and must not be done twice.
        for action in self._acknowledgements.used[self._num_received : num_received]:
            sent = self._pending.pop((self._step, action), None)
            if sent is not None:
                self._wait(action, sent)
        self._num_received = max(self._num_received, num_received)

    def drain(self) -> None:
        """Wait until everything sent has left."""
        while self._pending:
            key = next(iter(self._pending))
            self._wait(key[1], self._pending.pop(key))

    def _wait(self, action: Action, sent: _Sent) -> None:
        for work in sent.works:
            wait(work, f"{name_result(action)} to be received by pipeline rank {self._peer}")


class Receiver:
    """The receiving end of a channel: messages are posted ahead of their use, in the order of the sender.

    Args:
        peer: pipeline rank of the sender.
        end: the sender, for tensors.
        header_end: the sender on CPUs, for their descriptions.
        device: where the tensors go.
        find_meta: returns the description of an action's result, or None where the sender is going to tell it.
        learn_meta: called with what the sender told.
        may_defer: whether a receive whose description is not known yet may be posted when it is needed; otherwise
            posting waits for the description.
    """

    def __init__(
        self,
        *,
        peer: int,
        end: End,
        header_end: End,
        device: torch.device,
        find_meta: Callable[[Action], NestedMeta | None],
        learn_meta: Callable[[Action, NestedMeta], Any],
        may_defer: bool,
    ) -> None:
        self._peer = peer
        self._end = end
        self._header_end = header_end
        self._device = device
        self._find_meta = find_meta
        self._learn_meta = learn_meta
        self._may_defer = may_defer
        self._deferred: deque[Action] = deque()
        self._posted: dict[Action, tuple[list[dist.Work], tuple[Tensor, ...]]] = {}

    def start(self) -> None:
        """Begin a step."""
        assert not self._posted, "the step before was left in the middle"
        assert not self._deferred, "the step before was left in the middle"

    def post(self, action: Action) -> None:
        """Ask for an action's result, the next one that the sender sends."""
        self._deferred.append(action)
        while self._deferred and (meta := self._find_meta(self._deferred[0])) is not None:
            self._post_first(meta)
        while self._deferred and not self._may_defer:
            self._post_first(self._learn())

    def _learn(self) -> NestedMeta:
        """Wait for the description of the next message."""
        action = self._deferred[0]
        header = torch.empty(HEADER_BYTES, dtype=torch.uint8)
        wait(self._header_end.receive(header), f"the shape of {name_result(action)} from pipeline rank {self._peer}")
        meta = decode_meta(header)
        self._learn_meta(action, meta)
        return meta

    def _post_first(self, meta: NestedMeta) -> None:
        buffers = tuple(tensor.empty(self._device) for tensor in meta.tensors)
        self._posted[self._deferred.popleft()] = [self._end.receive(buffer) for buffer in buffers], buffers

    def receive(self, action: Action) -> tuple[Tensor, ...]:
        """Wait for what was posted, and return the tensors of an action's result."""
        while action not in self._posted:
            meta = self._find_meta(self._deferred[0])
            self._post_first(self._learn() if meta is None else meta)
        works, buffers = self._posted.pop(action)
        for work in works:
            wait(work, f"{name_result(action)} from pipeline rank {self._peer}")
        return buffers
