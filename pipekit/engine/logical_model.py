"""A model as checkpoints know it: logical tensors under logical names, whichever rank holds which part of them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from pipekit.tensor_parallel import TensorGroup


class LogicalModel(Protocol):
    """Protocol of a model that checkpoints hold; `PipelineModule` implements it for the layers of its rank."""

    @property
    def tensor_group(self) -> TensorGroup | None:
        """The tensor-parallel peers; None where there are none."""

    @property
    def seed(self) -> int:
        """Seed of the initial weights."""

    def named_logical_parameters(self) -> Iterator[tuple[str, nn.Parameter, bool]]:
        """Yield `(logical name, parameter, owned)` for each parameter of this rank, a shared one once."""

    def named_logical_buffers(self) -> Iterator[tuple[str, Tensor, bool]]:
        """Yield `(logical name, buffer, owned)` for each persistent buffer of this rank."""

    def description(self) -> dict[str, Any]:
        """Description of the model for the configuration in a checkpoint."""


class WholeModel:
    """Any module that each rank holds whole; the logical names are those of its `state_dict`.

    Args:
        module: the module.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self.tensor_group = None
        self.seed = torch.initial_seed()

    def named_logical_parameters(self) -> Iterator[tuple[str, nn.Parameter, bool]]:
        """Yield `(name, parameter, True)` for each parameter of the module."""
        for name, parameter in self._module.named_parameters():
            yield name, parameter, True

    def named_logical_buffers(self) -> Iterator[tuple[str, Tensor, bool]]:
        """Yield `(name, buffer, True)` for each persistent buffer of the module."""
        for name, buffer in persistent_buffers(self._module):
            yield name, buffer, True

    def description(self) -> dict[str, Any]:
        """Return the name of the module's class."""
        return {"module": type(self._module).__name__}


def persistent_buffers(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield the name and the tensor of each buffer that a module's `state_dict` holds.

    Example:
        >>> [name for name, _ in persistent_buffers(nn.BatchNorm1d(2))]
        ['running_mean', 'running_var', 'num_batches_tracked']
    """
    parameters = {name for name, _ in module.named_parameters(remove_duplicate=False)}
    for name, tensor in module.state_dict(keep_vars=True).items():
        if name not in parameters:
            yield name, tensor
