"""LAMB: Adam's update of each tensor, scaled to the norm of its weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pipekit.optimizers.whole_tensors import Piece, SharedOptimizer


class Lamb(SharedOptimizer):
    """LAMB, also where ranks hold shards of the tensors: norms are those of the whole ones.

    Source: You et al., Large Batch Optimization for Deep Learning: Training BERT in 76 minutes, algorithm 2.

    Args:
        params: parameters, or groups of them.
        lr: learning rate.
        betas: decay of the averages of the gradient and of its square.
        eps: added to the denominator.
        weight_decay: added to the update, times the weights.
        min_coeff: least factor of an update; None sets no limit.
        max_coeff: largest factor of an update; None sets no limit.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        min_coeff: float | None = None,
        max_coeff: float | None = None,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, {**defaults, "min_coeff": min_coeff, "max_coeff": max_coeff})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Make one update."""
        loss = closure() if closure is not None else None
        for group in self.param_groups:
            weights = [each for each in group["params"] if each.grad is not None]
            updates = [self._update(each, group) for each in weights]
            pieces = [
                (each, update, piece)
                for each, update in zip(weights, updates, strict=True)
                for piece in self.tensors.pieces(each)
            ]
            if not pieces:
                continue
            squares = torch.stack([_squares(each, update, piece) for each, update, piece in pieces])
            norms = self.tensors.sums(squares, [piece for _, _, piece in pieces]).sqrt().to(squares.device)
            factors = torch.where((norms > 0).all(1), norms[:, 0] / norms[:, 1], 1.0)
            if group["min_coeff"] is not None or group["max_coeff"] is not None:
                factors = factors.clamp(group["min_coeff"], group["max_coeff"])
            for (each, update, piece), factor in zip(pieces, factors, strict=True):
                piece.of(each).sub_(piece.of(update) * (factor * group["lr"]))
        return loss

    def _update(self, weights: Tensor, group: dict[str, Any]) -> Tensor:
        average, square_average, step = self.update_moments(weights, group["betas"])
        beta1, beta2 = group["betas"]
        denominator = (square_average / (1 - beta2**step)).sqrt_().add_(group["eps"])
        update: Tensor = (average / (1 - beta1**step)).div_(denominator)
        return update.add_(weights, alpha=group["weight_decay"])


def _squares(weights: Tensor, update: Tensor, piece: Piece) -> Tensor:
    return torch.stack([piece.of(weights).float().square().sum(), piece.of(update).float().square().sum()])
