"""Exponential moving average of the weights, kept as a further state of the optimizer."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from pipekit.checkpoint.manifest import EMA
from pipekit.engine.training_engine import TrainingEngine


def track_ema(optimizer: torch.optim.Optimizer, decay: float) -> None:
    """Keep a moving average in fp32 of the weights that an engine's optimizer updates, starting at its first update.

    After each update it becomes `decay * average + (1 - decay) * weights`. As a state of the optimizer, it is sharded,
    offloaded, saved and loaded like the moments.
    """

    @torch.no_grad()
    def update(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        # Under ZeRO the groups hold flat pieces of the masters, and at times only the group that is updated now.
        for group in optimizer.param_groups:
            for weights in group["params"]:
                state = optimizer.state[weights]
                if EMA not in state:
                    state[EMA] = weights.detach().to(torch.float32, copy=True)
                else:
                    state[EMA].lerp_(weights.detach().float(), 1 - decay)

    optimizer.register_step_post_hook(update)


@contextlib.contextmanager
def ema_weights(engine: TrainingEngine) -> Iterator[None]:
    """Context manager that replaces the weights by the average, and restores them. All ranks enter it together."""
    if EMA not in engine.view.state_names():
        yield  # before the first update
        return
    _swap(engine)
    try:
        yield
    finally:
        _swap(engine)


@torch.no_grad()
def _swap(engine: TrainingEngine) -> None:
    view = engine.view
    for weights, state in view.torch_optimizer.state.items():
        if EMA in state:
            kept = weights.detach().clone()
            weights.copy_(state[EMA])
            state[EMA].copy_(kept)
    # The weights that compute follow from the masters, of which each replica has a piece.
    trainable = [each for _, each, _ in engine.module.named_logical_parameters() if each.requires_grad]
    view.load_masters((parameter, view.full_master(parameter).clone()) for parameter in trainable)
