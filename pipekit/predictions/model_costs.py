"""Costs of a model for one micro-batch: its layers and its loss."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from pipekit.predictions.layer_costs import LayerCosts


@dataclass(frozen=True)
class ModelCosts:
    """Costs of a model for one micro-batch.

    Attributes:
        layers: one for each layer spec, in order.
        loss: the loss function, which the last stage computes after its layers; None where the last layer returns the
            loss itself.
    """

    layers: list[LayerCosts]
    loss: LayerCosts | None = None

    @property
    def is_measured(self) -> bool:
        """True if everything was timed."""
        everything = [*self.layers, *([] if self.loss is None else [self.loss])]
        return all(layer.seconds is not None for layer in everything)


def stage_extras(costs: ModelCosts, num_stages: int, cost: Callable[[LayerCosts], float]) -> list[float]:
    """Costs of each stage beside its layers: the loss on the last one."""
    extras = [0.0] * num_stages
    if costs.loss is not None:
        extras[-1] = cost(costs.loss)
    return extras
