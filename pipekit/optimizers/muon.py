"""Muon for matrices, and AdamW for all other weights, as one optimizer."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from pipekit.optimizers.whole_tensors import SharedOptimizer

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)


class MatricesAndVectors(SharedOptimizer):
    """Muon for groups of matrices and AdamW for others, also where ranks hold shards of the matrices.

    A group says which by `algorithm`; unless it does, matrices alone make Muon. The ranks that hold parts of a matrix
    join the momentum of its gradient, and each makes the whole matrix orthogonal to take its own part of it.

    Source: Jordan et al., Muon: An optimizer for hidden layers in neural networks, in the form of torch.optim.Muon;
    AdamW: Loshchilov and Hutter, Decoupled Weight Decay Regularization.

    Args:
        params: parameters, or groups of them.
        lr: learning rate.
        momentum: of Muon.
        betas: of AdamW.
        eps: of AdamW.
        weight_decay: of both, decoupled.
        nesterov: whether Muon's momentum is Nesterov's.
        ns_steps: number of Newton-Schulz iterations.
        ns_dtype: number format of these iterations.
        adjust_lr_fn: how the rate of a matrix depends on its shape: `original`, or `match_rms_adamw`, which makes
            updates as large as AdamW's, so that both can have the same rate.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.1,
        nesterov: bool = True,
        ns_steps: int = 5,
        ns_dtype: Literal["bfloat16", "float32"] = "bfloat16",
        adjust_lr_fn: Literal["original", "match_rms_adamw"] = "original",
    ) -> None:
        defaults = {"lr": lr, "momentum": momentum, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        defaults |= {"nesterov": nesterov, "ns_steps": ns_steps, "ns_dtype": ns_dtype, "adjust_lr_fn": adjust_lr_fn}
        super().__init__(params, {**defaults, "algorithm": None})
        for group in self.param_groups:
            if group["algorithm"] is None:
                group["algorithm"] = "muon" if all(each.ndim == 2 for each in group["params"]) else "adamw"

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Make one update."""
        loss = closure() if closure is not None else None
        for group in self.param_groups:
            update = self._update_matrices if group["algorithm"] == "muon" else self._update_others
            for weights in group["params"]:
                if weights.grad is not None:
                    weights.mul_(1 - group["lr"] * group["weight_decay"])
                    update(weights, group)
        return loss

    def _update_matrices(self, weights: Tensor, group: dict[str, Any]) -> None:
        state = self.state[weights]
        if "momentum_buffer" not in state:
            state["step"] = torch.zeros((), dtype=torch.float32)
            state["momentum_buffer"] = torch.zeros_like(weights)
        state["step"] += 1
        average, gradient = state["momentum_buffer"], weights.grad
        assert gradient is not None
        average.lerp_(gradient, 1 - group["momentum"])
        direction = gradient.lerp(average, group["momentum"]) if group["nesterov"] else average
        for piece in self.tensors.pieces(weights):
            whole = self.tensors.whole(direction, piece)
            if piece.length:
                orthogonal = orthogonalize(whole, steps=group["ns_steps"], dtype=getattr(torch, group["ns_dtype"]))
                rows, columns = whole.shape
                factor = math.sqrt(max(1, rows / columns))
                if group["adjust_lr_fn"] == "match_rms_adamw":
                    factor = 0.2 * math.sqrt(max(rows, columns))
                own = self.tensors.take(orthogonal, piece).to(weights)
                piece.of(weights).add_(own, alpha=-group["lr"] * factor)

    def _update_others(self, weights: Tensor, group: dict[str, Any]) -> None:
        average, square_average, step = self.update_moments(weights, group["betas"])
        beta1, beta2 = group["betas"]
        denominator = (square_average.sqrt() / math.sqrt(1 - beta2**step)).add_(group["eps"])
        weights.addcdiv_(average, denominator, value=-group["lr"] / (1 - beta1**step))


def orthogonalize(matrix: Tensor, *, steps: int = 5, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Nearly orthogonal matrix that is next to a given one, (rows, columns): its singular values go to about 1.

    Source: Jordan et al., Muon, by a Newton-Schulz iteration of degree five.
    """
    a, b, c = _COEFFICIENTS
    rows, columns = matrix.shape
    found = (matrix.T if rows > columns else matrix).to(dtype)
    found = found / found.norm().clamp(min=1e-7)
    for _ in range(steps):
        gram = found @ found.T
        found = torch.addmm(found, torch.addmm(gram, gram, gram, beta=b, alpha=c), found, beta=a)
    return found.T if rows > columns else found
