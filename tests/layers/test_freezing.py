"""Patterns of parameters that are not trained."""

from __future__ import annotations

import pytest
from torch import nn

from pipekit.errors import ConfigError
from pipekit.layers.freezing import freeze
from pipekit.layers.parameters import count_parameters, parameter_shapes, trained_and_frozen_shapes
from pipekit.layers.sequential import SequentialModel
from pipekit.layers.specs import LayerSpec, TiedLayerSpec, spec_key

SPECS = [
    TiedLayerSpec("embed", nn.Embedding, 5, 4),
    LayerSpec(nn.Linear, 4, 4, name="blocks.0"),
    LayerSpec(nn.Linear, 4, 4, name="blocks.1"),
    TiedLayerSpec("embed", nn.Embedding, 5, 4),
]


@pytest.mark.parametrize(
    ("patterns", "trained"),
    [
        ([], {"embed.weight", "blocks.0.weight", "blocks.0.bias", "blocks.1.weight", "blocks.1.bias"}),
        (["embed.weight"], {"blocks.0.weight", "blocks.0.bias", "blocks.1.weight", "blocks.1.bias"}),
        (["*.weight", "blocks.0.*"], {"blocks.1.bias"}),
        (["blocks.[0-9].weight"], {"embed.weight", "blocks.0.bias", "blocks.1.bias"}),
    ],
)
def test_built_layers_train_what_no_pattern_matches(patterns: list[str], trained: set[str]) -> None:
    specs = freeze(SPECS, patterns)
    tensors = SequentialModel(specs).logical_tensors()
    assert {name for name, tensor in tensors.items() if tensor.requires_grad} == trained
    shapes = {**parameter_shapes(specs)[0], **parameter_shapes(specs)[1], **parameter_shapes(specs)[2]}
    assert shapes.keys() == trained
    frozen = {name for layer in trained_and_frozen_shapes(specs)[1] for name in layer}
    assert frozen == tensors.keys() - trained
    assert count_parameters(specs) == sum(tensors[name].numel() for name in trained)


def test_equal_layers_of_which_one_is_frozen_are_not_taken_for_equal() -> None:
    _, first, second, _ = freeze(SPECS, ["blocks.0.*"])
    assert spec_key(SPECS[1]) == spec_key(SPECS[2])
    assert spec_key(first) != spec_key(second)
    assert not SPECS[1].frozen, "the specs given are left as they are"


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        (["blocks.0.wieght"], r"train.freeze: 'blocks.0.wieght' matches none of the model's 6 .*try 'blocks.0.weight'"),
        (["embed.*", "block"], "train.freeze: 'block' matches none"),
        (["*"], r"train.freeze=\['\*'\] freezes every parameter"),
    ],
)
def test_a_pattern_that_does_not_fit_is_refused(patterns: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        freeze(SPECS, patterns)
