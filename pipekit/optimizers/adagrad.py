"""Adagrad whose states begin with the first update, as those of the other optimizers do.

Torch's begin when it is built. DeepSpeed's ZeRO therefore builds another one around its flat pieces, and loses the
settings of parameter groups on the way.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


class Adagrad(torch.optim.Optimizer):
    """Adagrad, with the updates and the settings of `torch.optim.Adagrad`.

    Source: Duchi et al., Adaptive Subgradient Methods for Online Learning and Stochastic Optimization.

    Args:
        params: parameters, or groups of them.
        lr: learning rate.
        lr_decay: decay of the learning rate with the number of updates.
        weight_decay: added to the gradient, times the weights.
        initial_accumulator_value: where the sums of squares begin.
        eps: added to the denominator.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-2,
        lr_decay: float = 0.0,
        weight_decay: float = 0.0,
        initial_accumulator_value: float = 0.0,
        eps: float = 1e-10,
    ) -> None:
        defaults = {"lr": lr, "lr_decay": lr_decay, "weight_decay": weight_decay, "eps": eps}
        super().__init__(params, {**defaults, "initial_accumulator_value": initial_accumulator_value})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Make one update."""
        loss = closure() if closure is not None else None
        for group in self.param_groups:
            for weights in group["params"]:
                if weights.grad is None:
                    continue
                state = self.state[weights]
                if "sum" not in state:
                    state["step"] = torch.zeros((), dtype=torch.float32)
                    state["sum"] = torch.full_like(weights, group["initial_accumulator_value"])
                state["step"] += 1
                gradient = weights.grad.add(weights, alpha=group["weight_decay"])
                state["sum"].addcmul_(gradient, gradient)
                rate = group["lr"] / (1 + (float(state["step"]) - 1) * group["lr_decay"])
                weights.addcdiv_(gradient, state["sum"].sqrt().add_(group["eps"]), value=-rate)
        return loss
