"""Progressive layer drop: the blocks that each micro-batch of a step leaves out, the same on every rank.

The output that a kept block adds to the residual stream is divided by the probability of keeping the block, so
evaluation, which keeps every block, needs no other scale.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from pipekit.errors import ConfigError
from pipekit.layers.specs import LayerSpec, TiedLayerSpec, layer_names
from pipekit.rng import fold_seed

_BLOCK = re.compile(r"(.*?\.\d+)(?:\..*)?")


@dataclass(frozen=True)
class LayerDrop:
    """Schedule of the probabilities of keeping blocks.

    Args:
        theta: limit of the probability of keeping the last block.
        gamma: speed at which the probability approaches this limit, per step.

    Source: Zhang and He 2020, "Accelerating Training of Transformer-Based Language Models with Progressive Layer
    Dropping".
    """

    theta: float
    gamma: float

    def theta_at(self, step: int) -> float:
        """Probability of keeping the last block in the step after `step` steps.

        Example:
            >>> drop = LayerDrop(theta=0.5, gamma=0.001)
            >>> drop.theta_at(0), round(drop.theta_at(1000), 3)
            (1.0, 0.684)
        """
        return (1.0 - self.theta) * math.exp(-self.gamma * step) + self.theta

    def keep_probability(self, block: int, num_blocks: int, *, step: int) -> float:
        """Probability of keeping a block, counted from 1, in the step after `step` steps."""
        return 1.0 - block / num_blocks * (1.0 - self.theta_at(step))

    def draw_scale(self, block: int, num_blocks: int, *, seed: int, step: int, micro_batch: int) -> float | None:
        """Factor of a block's output, counted from 1, for one micro-batch of the global batch; None drops the block."""
        probability = self.keep_probability(block, num_blocks, step=step)
        draw = fold_seed(seed, "layer drop", step, micro_batch, block) / 2**63
        return 1.0 / probability if draw < probability else None


def number_blocks(specs: Sequence[LayerSpec]) -> dict[int, int]:
    """Block numbers, from 1, of the layers that can be dropped, by the layer's index.

    The class of such a layer has a `residual_scale`, by which it multiplies the output that it adds to its input.
    Layers whose names are equal up to a number, such as `blocks.3.attention` and `blocks.3.mlp`, are one block.

    Raises:
        ConfigError: if no layer can be dropped.
    """
    blocks: dict[str, int] = {}
    numbers: dict[int, int] = {}
    for layer_idx, (spec, name) in enumerate(zip(specs, layer_names(specs), strict=True)):
        if hasattr(spec.typename, "residual_scale") and not isinstance(spec, TiedLayerSpec):
            found = _BLOCK.fullmatch(name)
            numbers[layer_idx] = blocks.setdefault(name if found is None else found[1], len(blocks) + 1)
    if not numbers:
        raise ConfigError(
            "train.layer_drop: no layer of the model can be left out; give the class of your blocks a residual_scale = "
            "1.0 that multiplies what they add to their input, or leave train.layer_drop out"
        )
    return numbers
