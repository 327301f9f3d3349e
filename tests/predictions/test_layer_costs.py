"""Costs of a tensor-parallel rank's part of a layer."""

from __future__ import annotations

from typing import Any

import pytest

from pipekit.predictions.layer_costs import (
    LayerCosts,
    recompute_layers,
    shard_layers,
    stage_activation_bytes,
    stage_host_bytes,
)
from pipekit.predictions.memory import recomputation_bytes
from pipekit.settings.activations import read_setting
from predictions.planned import layer


def test_everything_is_shared_out_and_rounded_up() -> None:
    whole = layer(100, parameters=10, passed_bytes=9, saved_bytes=16)
    (part,) = shard_layers([whole], 4)
    assert (part.forward_flops, part.parameters, part.input_bytes, part.saved_bytes) == (25, 3, 3, 4)
    assert (part.keeps_input, part.keeps_output) == (whole.keeps_input, whole.keeps_output)


def test_alone_a_rank_has_it_all() -> None:
    layers = [layer(), layer(7)]
    assert shard_layers(layers, 1) == layers


def test_without_sequence_parallelism_what_passes_between_layers_is_whole_on_each_rank() -> None:
    (part,) = shard_layers([LAYER], 4, sequence_parallel=False)
    assert (part.input_bytes, part.output_bytes, part.saved_bytes, part.forward_flops) == (16, 16, 25, 10)


LAYER = LayerCosts(
    20, 40, 40, 40, input_bytes=16, output_bytes=16, saved_bytes=100, keeps_input=True, keeps_output=False
)


@pytest.mark.parametrize(
    ("setting", "held", "host", "recomputed", "num_recomputed"),
    [
        (False, 5 * 16 + 4 * 100, 0, 0, 0),
        (True, 5 * 16, 0, 100, 4),
        ({"every": 2}, 5 * 16 + 2 * 100, 0, 100, 2),
        ({"layers": ["c"]}, 5 * 16 + 3 * 100, 0, 100, 1),
        # The stage's own input and output are whole; of the three inputs between, a rank keeps a quarter.
        ({"partition": True}, 2 * 16 + 3 * 4, 0, 16 + 100, 4),
        # One input is there, and another on its way.
        ({"offload": True}, 2 * 16, 3 * 16, 16 + 16 + 100, 4),
        ({"partition": True, "offload": True}, 2 * 16, 3 * 4, 16 + 4 + 100, 4),
        ({"layers": ["c"], "offload": True}, 4 * 16 + 3 * 100, 16, 16 + 16 + 100, 1),
        ({"only": "attention"}, 5 * 16 + 4 * 100, 0, 0, 0),
    ],
)
def test_what_a_stage_holds_under_each_form_can_be_told_by_hand(
    setting: Any, held: int, host: int, recomputed: int, num_recomputed: int
) -> None:
    layers = recompute_layers([LAYER] * 4, read_setting(setting), ["a", "b", "c", "d"], tp=4)
    assert (stage_activation_bytes(layers), stage_host_bytes(layers)) == (held, host)
    assert recomputation_bytes(layers) == recomputed
    assert sum(layer.recomputed_flops for layer in layers) == 40 * num_recomputed
