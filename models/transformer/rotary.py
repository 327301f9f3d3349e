"""Rotary positions: queries and keys are rotated by an angle that grows with their position.

Shapes: B sequences, H heads, S tokens, E head size, R rotated size.

Source: Su et al. 2021, "RoFormer: Enhanced Transformer with Rotary Position Embedding". Dimensions are paired as in
GPT-NeoX, each of the first half of R with its counterpart in the second.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pipekit.models.rotary_scaling import RotaryScaling


@dataclass(frozen=True)
class Rotary:
    """Rotation of the first dimensions of each head.

    Attributes:
        size: R, even.
        base: of the wavelengths, which are 2 pi x base^(i / R) tokens for i = 0, 2, 4, ...
        scaling: makes them longer.
    """

    size: int
    base: float = 10_000.0
    scaling: RotaryScaling | None = None

    def rotate(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Rotated queries and keys of a sequence from its first token on, each `(B, heads, S, E)`."""
        exponents = torch.arange(0, self.size, 2, dtype=torch.float32, device=q.device) / self.size
        frequencies, factor = 1.0 / self.base**exponents, 1.0  # (R / 2)
        if self.scaling is not None:
            frequencies, factor = self.scaling.scale(frequencies, self.base, q.shape[2])
        positions = torch.arange(q.shape[2], dtype=torch.float32, device=q.device)
        angles = positions.unsqueeze(1) * frequencies  # (S, R / 2)
        angles = torch.cat((angles, angles), dim=1)  # (S, R)
        cos, sin = (angles.cos() * factor).to(q.dtype), (angles.sin() * factor).to(q.dtype)
        return self._rotate(q, cos, sin), self._rotate(k, cos, sin)

    def _rotate(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        rotated, rest = x[..., : self.size], x[..., self.size :]
        first, second = rotated.chunk(2, dim=-1)
        rotated = rotated * cos + torch.cat((-second, first), dim=-1) * sin
        return torch.cat((rotated, rest), dim=-1) if rest.shape[-1] else rotated
