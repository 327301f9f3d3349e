"""Channels between neighbouring stages: receives posted early, sends that do not wait.

Activations flow over one process group and gradients over another, so that on NCCL, where the operations of a
communicator run in order, a receive posted early never stands in the way of a send. Shapes travel over a CPU group.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from pipekit.errors import CommunicationError, PipekitError

_DTYPES = (
    torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8,
    torch.uint8, torch.bool,
)  # fmt: skip
_DTYPE_CODE = {dtype: code for code, dtype in enumerate(_DTYPES)}
_HEADER_LENGTH = 128


@dataclass(frozen=True)
class TensorMeta:
    """What a receiver must know of a tensor before it arrives."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    requires_grad: bool

    @classmethod
    def of(cls, tensor: Tensor) -> TensorMeta:
        """Describe `tensor`."""
        return cls(tuple(tensor.shape), tensor.dtype, tensor.requires_grad)

    def empty(self, device: torch.device) -> Tensor:
        """Allocate a tensor of this shape and dtype."""
        return torch.empty(self.shape, dtype=self.dtype, device=device)

    def __str__(self) -> str:
        return f"{tuple(self.shape)} {str(self.dtype).removeprefix('torch.')}"


def _encode(metas: tuple[TensorMeta, ...]) -> Tensor:
    numbers = [len(metas)]
    for meta in metas:
        numbers += [_DTYPE_CODE[meta.dtype], int(meta.requires_grad), len(meta.shape), *meta.shape]
    if len(numbers) > _HEADER_LENGTH:
        raise PipekitError(
            f"a stage passes {len(metas)} tensors on, and their shapes take {len(numbers)} numbers where "
            f"{_HEADER_LENGTH} "
            "fit; pass fewer tensors between layers"
        )
    return torch.tensor(numbers + [0] * (_HEADER_LENGTH - len(numbers)), dtype=torch.int64)


def _decode(header: Tensor) -> tuple[TensorMeta, ...]:
    numbers = iter(header.tolist())
    metas = []
    for _ in range(next(numbers)):
        dtype, requires_grad, num_dims = _DTYPES[next(numbers)], bool(next(numbers)), next(numbers)
        metas.append(TensorMeta(tuple(next(numbers) for _ in range(num_dims)), dtype, requires_grad))
    return tuple(metas)


def wait(work: dist.Work, what: str) -> None:
    """Wait for a message.

    Raises:
        CommunicationError: if it fails or lasts longer than the group's time limit; it names `what`.
    """
    try:
        work.wait()
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CommunicationError(f"rank {dist.get_rank()} failed while waiting for {what}: {reason}") from error


def _send(tensor: Tensor, peer: int, group: dist.ProcessGroup) -> dist.Work:
    work = dist.isend(tensor, peer, group=group)
    assert work is not None, f"rank {dist.get_rank()} is not in the group"
    return work


def _receive(tensor: Tensor, peer: int, group: dist.ProcessGroup) -> dist.Work:
    work = dist.irecv(tensor, peer, group=group)
    assert work is not None, f"rank {dist.get_rank()} is not in the group"
    return work


class Sender:
    """The sending end of a channel.

    Args:
        peer: global rank of the receiver.
        group: carries the tensors.
        header_group: a CPU group that carries the shapes; None where the receiver already knows them.
    """

    def __init__(self, *, peer: int, group: dist.ProcessGroup, header_group: dist.ProcessGroup | None = None) -> None:
        self._peer = peer
        self._group = group
        self._header_group = header_group
        self._metas: tuple[TensorMeta, ...] | None = None
        self._pending: deque[tuple[list[dist.Work], tuple[Tensor, ...], str]] = deque()

    def start(self) -> None:
        """Begin a step: the next message says its shapes."""
        self._metas = None

    def send(self, tensors: tuple[Tensor, ...], what: str) -> None:
        """Send `tensors` without waiting for them to arrive.

        Raises:
            PipekitError: if their shapes differ from those of the step's first message.
        """
        works: list[dist.Work] = []
        buffers: tuple[Tensor, ...] = tuple(tensor.detach().contiguous() for tensor in tensors)
        if self._header_group is not None:
            metas = tuple(TensorMeta.of(tensor) for tensor in tensors)
            if self._metas is None:
                header = _encode(metas)
                works.append(_send(header, self._peer, self._header_group))
                buffers = (*buffers, header)
                self._metas = metas
            elif metas != self._metas:
                raise PipekitError(
                    f"{what} is {', '.join(map(str, metas))}, but the step's first micro-batch was "
                    f"{', '.join(map(str, self._metas))}; all micro-batches of a step must have one shape: pad the "
                    "short ones or drop the last"
                )
        works += [_send(buffer, self._peer, self._group) for buffer in buffers[: len(tensors)]]
        # A buffer must outlive its send.
        self._pending.append((works, buffers, what))
        while self._pending and all(work.is_completed() for work in self._pending[0][0]):
            self._pending.popleft()

    def drain(self) -> None:
        """Wait until everything sent has left."""
        while self._pending:
            works, _, what = self._pending.popleft()
            for work in works:
                wait(work, f"{what} to be received by rank {self._peer}")


class Receiver:
    """The receiving end of a channel: one message is always asked for ahead of its use.

    Args:
        peer: global rank of the sender.
        group: carries the tensors.
        device: where the tensors go.
        header_group: a CPU group that carries the shapes; None where `start` is told them.
    """

    def __init__(
        self,
        *,
        peer: int,
        group: dist.ProcessGroup,
        device: torch.device,
        header_group: dist.ProcessGroup | None = None,
    ) -> None:
        self._peer = peer
        self._group = group
        self._device = device
        self._header_group = header_group
        self._metas: tuple[TensorMeta, ...] | None = None
        self._num_to_post = 0
        self._posted: deque[tuple[list[dist.Work], tuple[Tensor, ...]]] = deque()

    def start(self, num_messages: int, metas: tuple[TensorMeta, ...] | None = None) -> None:
        """Begin a step of `num_messages` messages; `metas` are their shapes, unless the sender tells."""
        self._num_to_post = num_messages
        self._metas = metas
        self._post()

    @property
    def metas(self) -> tuple[TensorMeta, ...]:
        """The shapes of this step's messages."""
        assert self._metas is not None, "the first message has not been received"
        return self._metas

    def expect(self, metas: tuple[TensorMeta, ...]) -> None:
        """Say what the messages of this step look like."""
        if self._metas is None:
            self._metas = metas
            self._post()

    def _post(self) -> None:
        if self._metas is None or self._num_to_post == 0 or self._posted:
            return
        self._num_to_post -= 1
        buffers = tuple(meta.empty(self._device) for meta in self._metas)
        works = [_receive(buffer, self._peer, self._group) for buffer in buffers]
        self._posted.append((works, buffers))

    def receive(self, what: str) -> tuple[Tensor, ...]:
        """Return the next message's tensors, and ask for the one after it."""
        if self._metas is None:
            assert self._header_group is not None, "neither end knows the shapes"
            header = torch.empty(_HEADER_LENGTH, dtype=torch.int64)
            work = _receive(header, self._peer, self._header_group)
            wait(work, f"the shape of {what} from rank {self._peer}")
            self._metas = _decode(header)
            self._post()
        works, buffers = self._posted.popleft()
        for work in works:
            wait(work, f"{what} from rank {self._peer}")
        self._post()
        return buffers
