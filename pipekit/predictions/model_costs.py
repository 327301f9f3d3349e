"""What a model costs for one micro-batch: its layers and its loss."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from pipekit.predictions.layer_costs import LayerCosts


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

    @property
    def is_measured(self) -> bool:
        """Whether everything was timed."""
        everything = [*self.layers, *([] if self.loss is None else [self.loss])]
        return all(layer.seconds is not None for layer in everything)


def stage_extras(costs: ModelCosts, num_stages: int, cost: Callable[[LayerCosts], float]) -> list[float]:
    """Return what each stage costs beside its layers: the last one the loss."""
    extras = [0.0] * num_stages
    if costs.loss is not None:
        extras[-1] = cost(costs.loss)
    return extras
