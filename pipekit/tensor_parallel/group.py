"""Tensor groups: the tensor-parallel peers of a rank, and the collectives among them, as layers see them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Protocol

import torch
from torch import Tensor


class Pending(Protocol):
    """A collective that is running."""

    def wait(self) -> Tensor:
        """Wait for the result, and return it."""


class TensorGroup(ABC):
    """Tensor group: the ranks that each layer is sharded over.

    All ranks of the group call every collective, in the same order. A collective begun with `start_*` overlaps with the
    computation until `wait`, and its argument must not change meanwhile.

    Attributes:
        rank: this rank's index in the group.
        size: the tensor-parallel degree.
    """

    rank: int
    size: int

    @abstractmethod
    def start_all_reduce(self, tensor: Tensor) -> Pending:
        """Start to sum `tensor` over the group, in place."""

    @abstractmethod
    def start_all_gather(self, tensor: Tensor, dim: int) -> Pending:
        """Start to concatenate the tensors of all ranks, which have the same shape, along `dim`."""

    @abstractmethod
    def start_reduce_scatter(self, tensor: Tensor, dim: int) -> Pending:
        """Start to sum `tensor` over the group; this rank gets its shard of the sum along `dim`."""

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """Sum `tensor` over the group, in place, and return it."""
        return self.start_all_reduce(tensor).wait()

    def all_gather(self, tensor: Tensor, dim: int) -> Tensor:
        """Return the tensors of all ranks, concatenated along `dim`."""
        return self.start_all_gather(tensor, dim).wait()

    def reduce_scatter(self, tensor: Tensor, dim: int) -> Tensor:
        """Return this rank's shard along `dim` of the sum over the group."""
        return self.start_reduce_scatter(tensor, dim).wait()


class Done:
    """A collective that is already complete."""

    def __init__(self, result: Tensor) -> None:
        self._result = result

    def wait(self) -> Tensor:
        """Return the result."""
        return self._result


class PlannedGroup(TensorGroup):
    """A group without processes, for planning: its collectives return tensors of the shapes that a rank would get.

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
