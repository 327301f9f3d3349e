"""The learning rate of a step: a pure function, so that a resumed run needs no scheduler state."""

from __future__ import annotations

import math
from typing import Literal


def learning_rate(
    step: int,
    *,
    peak: float,
    shape: Literal["cosine", "linear", "constant"],
    warmup_steps: int,
    decay_steps: int,
    min_ratio: float,
) -> float:
    """Return the learning rate of the update after `step` updates.

    It rises linearly over `warmup_steps`, so that the first update already moves the weights, then falls from `peak` to
    `min_ratio * peak` at `decay_steps`, and stays there.

    Example:
        >>> settings = {"peak": 1.0, "shape": "cosine", "warmup_steps": 2, "decay_steps": 10, "min_ratio": 0.1}
        >>> [round(learning_rate(step, **settings), 3) for step in (0, 1, 2, 6, 10, 99)]
        [0.5, 1.0, 1.0, 0.55, 0.1, 0.1]
    """
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    if shape == "constant":
        return peak
    progress = min(1.0, (step - warmup_steps) / max(1, decay_steps - warmup_steps))
    remaining = 0.5 * (1.0 + math.cos(math.pi * progress)) if shape == "cosine" else 1.0 - progress
    return peak * (min_ratio + (1.0 - min_ratio) * remaining)
