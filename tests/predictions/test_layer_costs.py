"""Costs of a tensor-parallel rank's part of a layer."""

from __future__ import annotations

from pipekit.predictions.layer_costs import shard_layers
from predictions.planned import layer


def test_everything_is_shared_out_and_rounded_up() -> None:
    whole = layer(100, parameters=10, passed_bytes=9, saved_bytes=16)
    (part,) = shard_layers([whole], 4)
    assert (part.forward_flops, part.parameters, part.input_bytes, part.saved_bytes) == (25, 3, 3, 4)
    assert (part.keeps_input, part.keeps_output) == (whole.keeps_input, whole.keeps_output)


def test_alone_a_rank_has_it_all() -> None:
    layers = [layer(), layer(7)]
    assert shard_layers(layers, 1) == layers
