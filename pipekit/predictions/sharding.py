"""Costs of a layer on one tensor-parallel rank: its shard of the operations and of every activation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from pipekit.predictions.layer_costs import LayerCosts


def shard_layers(layers: Sequence[LayerCosts], tp: int) -> list[LayerCosts]:
    """Costs of each layer on one of `tp` ranks: one part in `tp` of everything.

    Norms and dropouts are sharded along the sequence, so that the ranks together hold every activation once.

    Source: Korthikanti et al. 2022, "Reducing Activation Recomputation in Large Transformer Models", section 4.2.2.
    """
    if tp == 1:
        return list(layers)
    made: dict[LayerCosts, LayerCosts] = {}
    return [made.setdefault(layer, _shard(layer, tp)) for layer in layers]


def _shard(layer: LayerCosts, tp: int) -> LayerCosts:
    return replace(
        layer,
        parameters=-(-layer.parameters // tp),
        forward_flops=-(-layer.forward_flops // tp),
        input_gradient_flops=-(-layer.input_gradient_flops // tp),
        weight_gradient_flops=-(-layer.weight_gradient_flops // tp),
        input_bytes=-(-layer.input_bytes // tp),
        output_bytes=-(-layer.output_bytes // tp),
        saved_bytes=-(-layer.saved_bytes // tp),
    )
