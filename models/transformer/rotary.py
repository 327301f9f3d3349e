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
from pipekit.models.transformer.documents import document_lengths


@dataclass(frozen=True)
class Rotary:
    """Rotation of the first dimensions of each head.

    Attributes:
        size: R, even.
        base: base of the wavelengths, which are 2 pi x base^(i / R) tokens for i = 0, 2, 4, ...
        scaling: makes the wavelengths longer.
    """

    size: int
    base: float = 10_000.0
    scaling: RotaryScaling | None = None

    @property
    def turns_at(self) -> int | None:
        """Sequence length above which all positions are rotated differently; None if there is none."""
        return None if self.scaling is None or self.scaling.type != "longrope" else self.scaling.original_max_positions

    def rotate(self, q: Tensor, k: Tensor, positions: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Rotate queries and keys of a sequence, each `(B, heads, S, E)`.

        Args:
            q: queries.
            k: keys.
            positions: `(B, S)`, positions of the tokens in their documents; None if the sequence is one document.
        """
        length = q.shape[2]
        if positions is None:
            return self.turn(q, k, *self.angles(torch.arange(length, device=q.device), length, q.dtype))
        num_tokens: int | Tensor = length
        if self.turns_at is not None and length > self.turns_at:
            num_tokens = document_lengths(positions).unsqueeze(-1)
        cos, sin = self.angles(positions, num_tokens, q.dtype)
        return self.turn(q, k, cos.unsqueeze(1), sin.unsqueeze(1))

    def angles(self, positions: Tensor, num_tokens: int | Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Cosines and sines `(..., R)` of the angles at positions `(...)` of a sequence of `num_tokens`.

        `num_tokens` may be `(..., 1)`, the length of each token's document.
        """
        exponents = torch.arange(0, self.size, 2, dtype=torch.float32, device=positions.device) / self.size
        frequencies, factor = 1.0 / self.base**exponents, 1.0  # (R / 2)
        if self.scaling is not None:
            frequencies, factor = self.scaling.scale(frequencies, self.base, num_tokens)
        angles = positions.to(torch.float32).unsqueeze(-1) * frequencies  # (..., R / 2)
        angles = torch.cat((angles, angles), dim=-1)  # (..., R)
        return (angles.cos() * factor).to(dtype), (angles.sin() * factor).to(dtype)

    def turn(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """Rotate queries and keys, each `(B, heads, S, E)`, by the cosines and sines from `angles`."""
        return self._rotate(q, cos, sin), self._rotate(k, cos, sin)

    def _rotate(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        rotated, rest = x[..., : self.size], x[..., self.size :]
        first, second = rotated.chunk(2, dim=-1)
        rotated = rotated * cos + torch.cat((-second, first), dim=-1) * sin
        return torch.cat((rotated, rest), dim=-1) if rest.shape[-1] else rotated
