"""What a model costs for one micro-batch: its layers and its loss."""

from __future__ import annotations

from dataclasses import dataclass

from pipekit.planner.layer_costs import LayerCosts


@dataclass(frozen=True)
class ModelCosts:
    """What a model costs for one micro-batch.

    Attributes:
        layers: one for each layer spec, in order.
        loss: what the loss function costs, which the last stage computes after its layers; None where the last layer
            returns the loss itself.
    """

    layers: list[LayerCosts]
    loss: LayerCosts | None = None
