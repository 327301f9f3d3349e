"""Lion: updates by the sign of a momentum, with one state for each weight."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


class Lion(torch.optim.Optimizer):
    """Lion.

    Source: Chen et al., Symbolic Discovery of Optimization Algorithms, program 1.

    Args:
        params: parameters, or groups of them.
        lr: learning rate; about a third to a tenth of AdamW's.
        betas: weight of the average in the update, and its decay.
        weight_decay: decoupled, as AdamW's; about three to ten times AdamW's.
    """

    def __init__(
        self, params: Any, lr: float = 1e-4, betas: tuple[float, float] = (0.9, 0.99), weight_decay: float = 0.0
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Make one update."""
        loss = closure() if closure is not None else None
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for weights in group["params"]:
                if weights.grad is None:
                    continue
                state = self.state[weights]
                if "exp_avg" not in state:
                    state["exp_avg"] = torch.zeros_like(weights)
                average = state["exp_avg"]
                weights.mul_(1 - group["lr"] * group["weight_decay"])
                weights.sub_(average.lerp(weights.grad, 1 - beta1).sign_(), alpha=group["lr"])
                average.lerp_(weights.grad, 1 - beta2)
        return loss
