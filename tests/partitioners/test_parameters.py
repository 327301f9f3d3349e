"""Stages of equally many parameters."""

from __future__ import annotations

import pytest

from pipekit.errors import LayoutError
from pipekit.layers.parameters import count_layer_parameters
from pipekit.models.gpt2 import GPT2Config
from pipekit.partitioners import partition_by_parameters, stage_costs


def test_gpt2_is_cut_between_its_halves() -> None:
    parameters = count_layer_parameters(GPT2Config(preset="gpt2").layer_specs())
    boundaries = partition_by_parameters(parameters, 4)
    loads = stage_costs(parameters, boundaries)
    assert boundaries == [0, 3, 15, 26, 28]
    assert max(loads) / (sum(loads) / 4) < 1.05


def test_large_embeddings_leave_the_blocks_even() -> None:
    model = GPT2Config(preset="tiny", vocab_size=50257)
    parameters = count_layer_parameters(model.layer_specs())
    loads = stage_costs(parameters, partition_by_parameters(parameters, 4))
    assert loads[0] == loads[3] == 50257 * 128
    assert max(loads[1:3]) / min(loads[1:3]) < 1.1


def test_fewer_layers_than_stages_is_refused() -> None:
    with pytest.raises(LayoutError, match=r"try parallel\.pp=2 or lower"):
        partition_by_parameters([5, 5], 3)
