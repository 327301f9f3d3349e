"""The tensor-parallel peers of a rank, as layers see them: what can be summed, gathered and scattered among them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Protocol

import torch
from torch import Tensor


class Pending(Protocol):
    """A collective that is under way."""

    def wait(self) -> Tensor:
        """Return its result, as soon as it is there."""


class TensorGroup(ABC):
    """The ranks that share each layer out among themselves.

    Every collective is called by all of them, in one order. What is begun with `start_*` runs behind what is computed
    until `wait`, and its argument must not be changed meanwhile.

    Attributes:
        rank: this rank's index in the group.
        size: the tensor-parallel degree.
    """

    rank: int
    size: int

    @abstractmethod
    def start_all_reduce(self, tensor: Tensor) -> Pending:
        """Begin to sum `tensor` over the group, in place."""

    @abstractmethod
    def start_all_gather(self, tensor: Tensor, dim: int) -> Pending:
        """Begin to join the tensors of all ranks, which have one shape, along `dim`."""

    @abstractmethod
    def start_reduce_scatter(self, tensor: Tensor, dim: int) -> Pending:
        """Begin to sum `tensor` over the group, of which this rank gets its part along `dim`."""

    @abstractmethod
    def all_reduce_max(self, tensor: Tensor) -> Tensor:
        """Return the elementwise maximum over the group, in place."""

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """Return the sum of `tensor` over the group, in place."""
        return self.start_all_reduce(tensor).wait()

    def all_gather(self, tensor: Tensor, dim: int) -> Tensor:
        """Return the tensors of all ranks, joined along `dim`."""
        return self.start_all_gather(tensor, dim).wait()

    def reduce_scatter(self, tensor: Tensor, dim: int) -> Tensor:
        """Return this rank's part along `dim` of the sum over the group."""
        return self.start_reduce_scatter(tensor, dim).wait()


class Done:
    """A collective that had nothing to wait for."""

    def __init__(self, result: Tensor) -> None:
        self._result = result

    def wait(self) -> Tensor:
        return self._result


class PlannedGroup(TensorGroup):
    """Peers that are not there: gives the shapes that a rank would get, to plan with.

    Example:
        >>> PlannedGroup(rank=0, size=4).all_gather(torch.empty(2, 8, device="meta"), dim=1).shape
        torch.Size([2, 32])
    """

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size

    def start_all_reduce(self, tensor: Tensor) -> Pending:
        return Done(tensor)

    def start_all_gather(self, tensor: Tensor, dim: int) -> Pending:
        return Done(torch.cat([tensor] * self.size, dim))

    def start_reduce_scatter(self, tensor: Tensor, dim: int) -> Pending:
        return Done(tensor.narrow(dim, 0, tensor.shape[dim] // self.size).clone())

    def all_reduce_max(self, tensor: Tensor) -> Tensor:
        return tensor
