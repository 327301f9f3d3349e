"""Counts and names of optimizer states, without processes."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from pipekit.deepspeed.optimizer_view import OptimizerView


def test_updates_are_counted_where_the_optimizer_counts_them() -> None:
    parameters = [nn.Parameter(torch.ones(2)) for _ in range(2)]
    optimizer = torch.optim.Adam(parameters)
    no_processes: Any = None
    view = OptimizerView(optimizer, no_processes, takes_gradients=False)
    assert view.step_count() == 0
    for step in range(3):
        # The first has a gradient once, as FusedAdam counts in the state of the last alone.
        parameters[0].grad = torch.ones(2) if step == 0 else None
        parameters[1].grad = torch.ones(2)
        optimizer.step()
    assert view.step_count() == 3
