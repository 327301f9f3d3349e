"""Tensors without values: shape, dtype and whether a gradient is required, alone and nested."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor

from pipekit.tensors.nested import Structure, flatten


@dataclass(frozen=True)
class TensorMeta:
    """Shape and dtype of a tensor, and whether it requires a gradient."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    requires_grad: bool

    @classmethod
    def of(cls, tensor: Tensor, *, dtype: torch.dtype | None = None) -> TensorMeta:
        """Describe `tensor`, with `dtype` in place of its own if that is given and it holds floating-point numbers."""
        dtype = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
        return cls(tuple(tensor.shape), dtype, tensor.requires_grad)

    @property
    def num_bytes(self) -> int:
        """Bytes of its elements."""
        return prod(self.shape) * self.dtype.itemsize

    def empty(self, device: torch.device | str) -> Tensor:
        """Allocate a tensor of this shape and dtype."""
        return torch.empty(self.shape, dtype=self.dtype, device=device)

    def __str__(self) -> str:
        return f"{str(self.dtype).removeprefix('torch.')}{list(self.shape)}"


@dataclass(frozen=True)
class NestedMeta:
    """Nested tensors without values: in order, and their nesting as `pipekit.tensors.nested` writes it."""

    tensors: tuple[TensorMeta, ...]
    structure: Structure

    @classmethod
    def of(cls, value: Any, what: str, *, dtype: torch.dtype | None = None) -> NestedMeta:
        """Describe nested tensors, floating-point ones with `dtype` in place of their own if it is given.

        Raises:
            PipekitError: if there is something else in `value`, which is called `what`.
        """
        tensors, structure = flatten(value, what)
        return cls(tuple(TensorMeta.of(tensor, dtype=dtype) for tensor in tensors), structure)

    @property
    def key(self) -> Hashable:
        """Equal for equal ones, and hashable."""
        return self.tensors, repr(self.structure)

    @property
    def num_bytes(self) -> int:
        """Bytes of all its tensors."""
        return sum(tensor.num_bytes for tensor in self.tensors)

    def on_meta(self) -> list[Tensor]:
        """Allocate the tensors on torch's meta device, where they take no memory."""
        return [tensor.empty("meta").requires_grad_(tensor.requires_grad) for tensor in self.tensors]

    def __str__(self) -> str:
        return ", ".join(map(str, self.tensors)) or "no tensor"
