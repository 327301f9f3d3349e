"""The torch optimizers that a configuration can name."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from pipekit.config import OptimizerConfig

# DeepSpeed's compute the same from the same states.
_ADAMS = {"adam", "adamw", "fusedadam", "deepspeedcpuadam"}


def takes_states_of(kind: str, config: OptimizerConfig) -> bool:
    """True if the configuration's optimizer goes on from the states that one of the class `kind` has left.

    Example:
        >>> takes_states_of("fusedadam", OptimizerConfig(type="adamw"))
        True
        >>> takes_states_of("sgd", OptimizerConfig(type="adamw"))
        False
    """
    return kind == config.type or {kind, config.type} <= _ADAMS


def build_optimizer(config: OptimizerConfig, parameters: Sequence[nn.Parameter]) -> torch.optim.Optimizer:
    """Return the optimizer, with weight decay on matrices and none on biases and norms."""
    matrices = [parameter for parameter in parameters if parameter.ndim >= 2]
    vectors = [parameter for parameter in parameters if parameter.ndim < 2]
    groups = [
        {"params": group, "weight_decay": decay}
        for group, decay in ((matrices, config.weight_decay), (vectors, 0.0))
        if group
    ]
    if config.type == "sgd":
        return torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum)
    kind = torch.optim.AdamW if config.type == "adamw" else torch.optim.Adam
    return kind(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)
