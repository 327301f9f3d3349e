"""Norms of tokens and of heads, by kind.

Source: Ba et al. 2016, "Layer Normalization"; Zhang & Sennrich 2019, "Root Mean Square Layer Normalization".
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipekit.tensor_parallel import SHARDED

Norm = Literal["layer", "rms", "offset_rms"]
"""Layer norm, root-mean-square norm, or the latter with weights that are counted from 1, as Gemma's."""


class OffsetRMSNorm(nn.Module):
    """Root-mean-square norm whose result is multiplied by 1 + `weight`, in fp32: `(..., D)` to `(..., D)`."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        return (F.rms_norm(x.to(wide), self.weight.shape, eps=self.eps) * (1 + self.weight.to(wide))).to(x.dtype)


class FinalNorm(nn.LayerNorm):
    """Layer norm of every token by itself: `(B, S, D)` to `(B, S, D)`."""

    sequence_flow = SHARDED


class FinalRMSNorm(nn.RMSNorm):
    """Root-mean-square norm of every token by itself: `(B, S, D)` to `(B, S, D)`."""

    sequence_flow = SHARDED


class FinalOffsetRMSNorm(OffsetRMSNorm):
    """Root-mean-square norm of every token by itself, times 1 + `weight`: `(B, S, D)` to `(B, S, D)`."""

    sequence_flow = SHARDED


NORMS: dict[Norm, Callable[..., nn.Module]] = {
    "layer": nn.LayerNorm,
    "rms": nn.RMSNorm,
    "offset_rms": OffsetRMSNorm,
}

FINAL_NORMS: dict[Norm, type[nn.Module]] = {
    "layer": FinalNorm,
    "rms": FinalRMSNorm,
    "offset_rms": FinalOffsetRMSNorm,
}
