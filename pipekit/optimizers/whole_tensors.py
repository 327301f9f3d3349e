"""Whole tensors behind what an optimizer updates: under ZeRO that is a flat piece of many parameters.

An optimizer whose update of a weight depends on others of its tensor, as a norm does, asks here. `WholeTensors` answers
for one process; `pipekit.engine.shared_tensors` has the answers of ranks that hold shards.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Piece:
    """The part of a parameter that lies in a tensor which an optimizer updates; it may be empty.

    Attributes:
        parameter: the parameter.
        shape: the parameter's shape on this rank, with what other replicas hold of it.
        start: where the part begins in the tensor, flattened.
        offset: where it begins in the parameter, flattened.
        length: its elements.
    """

    parameter: Tensor
    shape: tuple[int, ...]
    start: int
    offset: int
    length: int

    def of(self, tensor: Tensor) -> Tensor:
        """Its elements in a tensor of the optimizer's, or in a state of that: a view, flat."""
        return tensor.view(-1).narrow(0, self.start, self.length)


class WholeTensors:
    """Parameters of one process, each of which is what the optimizer updates."""

    def pieces(self, tensor: Tensor) -> Sequence[Piece]:
        """Pieces of a tensor, one for each parameter in it: as many, in the same order, on all ranks that share it."""
        return [Piece(tensor, tuple(tensor.shape), 0, 0, tensor.numel())]

    def sums(self, own: Tensor, pieces: Sequence[Piece]) -> Tensor:
        """Sum numbers of each piece, (pieces, numbers), over the ranks that hold parts of the same logical tensors."""
        return own

    def whole(self, values: Tensor, piece: Piece) -> Tensor:
        """Join the values of a piece and those of other ranks' to the logical tensor. They all call this together."""
        return piece.of(values).view(piece.shape)

    def take(self, whole: Tensor, piece: Piece) -> Tensor:
        """Elements of a logical tensor that are those of a piece, flat."""
        return whole.reshape(-1)


class SharedOptimizer(torch.optim.Optimizer):
    """Base of optimizers that need whole tensors.

    Attributes:
        tensors: the whole tensors behind what it updates; an engine replaces it.
    """

    tensors: WholeTensors

    def __init__(self, params: object, defaults: dict[str, object]) -> None:
        super().__init__(params, defaults)  # type: ignore[arg-type]
        self.tensors = WholeTensors()

    def update_moments(self, weights: Tensor, betas: tuple[float, float]) -> tuple[Tensor, Tensor, int]:
        """Update Adam's moments of a tensor by its gradient: the averages of that and of its square, and the step."""
        state, (beta1, beta2) = self.state[weights], betas
        if "exp_avg" not in state:
            state["step"] = torch.zeros((), dtype=torch.float32)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(weights), torch.zeros_like(weights)
        assert weights.grad is not None
        state["step"] += 1
        state["exp_avg"].lerp_(weights.grad, 1 - beta1)
        state["exp_avg_sq"].mul_(beta2).addcmul_(weights.grad, weights.grad, value=1 - beta2)
        return state["exp_avg"], state["exp_avg_sq"], int(state["step"])
