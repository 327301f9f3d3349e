"""GPT-2 as a list of layer specs."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from pipekit.config import GPTConfig
from pipekit.errors import ConfigError
from pipekit.models.gpt import AttentionHalf, PositionEmbedding, build_gpt2
from pipekit.sequential import SequentialModel
from pipekit.specs import TiedLayerSpec, layer_names


def small(**changes: Any) -> GPTConfig:
    sizes: dict[str, Any] = {
        "vocab_size": 61,
        "hidden_size": 24,
        "num_layers": 2,
        "num_heads": 3,
        "max_positions": 10,
    }
    return GPTConfig(**{**sizes, **changes})


def test_the_layers_are_named_in_order() -> None:
    assert layer_names(build_gpt2(small(tied_embedding=False))) == [
        "embed",
        "position",
        "blocks.0.attention",
        "blocks.0.mlp",
        "blocks.1.attention",
        "blocks.1.mlp",
        "final_norm",
        "head",
    ]
    tied = build_gpt2(small())
    assert layer_names(tied)[-1] == "embed"
    assert [isinstance(spec, TiedLayerSpec) for spec in tied] == [True, *[False] * 6, True]


@pytest.mark.parametrize("num_layers", [1, 5])
def test_the_configuration_knows_how_many_layers_there_are(num_layers: int) -> None:
    config = small(num_layers=num_layers)
    assert len(build_gpt2(config)) == config.num_layer_specs


@pytest.mark.parametrize("tied", [True, False])
def test_tensors_have_logical_names_and_a_tied_one_is_held_once(tied: bool) -> None:
    tensors = SequentialModel(build_gpt2(small(num_layers=1, tied_embedding=tied))).logical_tensors()
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    assert shapes == {
        "embed.weight": (61, 24),
        "position.weight": (10, 24),
        "blocks.0.attention.norm.weight": (24,),
        "blocks.0.attention.norm.bias": (24,),
        "blocks.0.attention.qkv.weight": (72, 24),
        "blocks.0.attention.qkv.bias": (72,),
        "blocks.0.attention.projection.weight": (24, 24),
        "blocks.0.attention.projection.bias": (24,),
        "blocks.0.mlp.norm.weight": (24,),
        "blocks.0.mlp.norm.bias": (24,),
        "blocks.0.mlp.expand.weight": (96, 24),
        "blocks.0.mlp.expand.bias": (96,),
        "blocks.0.mlp.contract.weight": (24, 96),
        "blocks.0.mlp.contract.bias": (24,),
        "final_norm.weight": (24,),
        "final_norm.bias": (24,),
        **({} if tied else {"head.weight": (61, 24)}),
    }


def test_each_layer_maps_one_tensor_to_one_tensor() -> None:
    x = torch.randint(61, (3, 10))
    for index, spec in enumerate(specs := build_gpt2(small(tied_embedding=False))):
        x = spec.build()(x)
        assert x.shape == (3, 10, 61 if index == len(specs) - 1 else 24)


def test_a_token_sees_only_those_before_it() -> None:
    model = SequentialModel(build_gpt2(small(init_std=0.5))).eval()
    tokens = torch.randint(61, (2, 10), generator=torch.Generator().manual_seed(0))
    changed = tokens.clone()
    changed[:, 6] = (changed[:, 6] + 1) % 61
    before, after = model(tokens), model(changed)
    torch.testing.assert_close(before[:, :6], after[:, :6], rtol=0, atol=1e-6)
    assert ((before - after).abs().amax(dim=(0, 2))[6:] > 1e-3).all()


def test_initial_weights_are_those_of_gpt2() -> None:
    config = small(hidden_size=192, num_layers=8, vocab_size=4000, max_positions=300, init_std=0.02)
    tensors = SequentialModel(build_gpt2(config), seed=3).logical_tensors()
    for name, tensor in tensors.items():
        tensor = tensor.detach()
        if name.endswith("bias"):
            assert (tensor == 0).all(), name
        elif "norm" in name:
            assert (tensor == 1).all(), name
        else:
            residual = "projection" in name or "contract" in name
            std = 0.02 / math.sqrt(2 * 8) if residual else 0.02
            assert abs(float(tensor.std()) / std - 1) < 0.03, name
            assert abs(float(tensor.mean())) < 5 * std / math.sqrt(tensor.numel()), name


def test_dropout_acts_in_training_only() -> None:
    model = SequentialModel(build_gpt2(small(dropout=0.5, init_std=0.3)))
    tokens = torch.randint(61, (1, 8))
    assert not torch.equal(model(tokens), model(tokens))
    model.eval()
    assert torch.equal(model(tokens), model(tokens))


@pytest.mark.parametrize("layer_idx", [1, 2, 3], ids=["position", "attention", "mlp"])
def test_every_layer_with_dropout_drops(layer_idx: int) -> None:
    layer = build_gpt2(small(dropout=0.5, init_std=0.3))[layer_idx].build()
    x = torch.randn(1, 8, 24)
    assert not torch.equal(layer(x), layer(x))


def test_attention_drops_what_a_token_looks_at() -> None:
    attention = AttentionHalf(24, 3, dropout=0.5, eps=1e-5, init_std=0.0, residual_std=0.0)
    with torch.no_grad():
        attention.qkv.bias[48:] = 1  # every value is 1, so each output is the sum of the weights that are left
        attention.projection.weight.copy_(torch.eye(24))
    x = torch.zeros(1, 10, 24)
    dropped = attention(x)[0]
    assert dropped[dropped != 0].unique().numel() > 2, "dropout after the projection alone leaves one value"
    torch.testing.assert_close(attention.eval()(x), torch.ones(1, 10, 24))


def test_half_blocks_add_to_their_input() -> None:
    for spec in build_gpt2(small())[2:4]:
        half = spec.build()
        with torch.no_grad():
            (half.projection if hasattr(half, "projection") else half.contract).weight.zero_()  # type: ignore[union-attr, operator]
        x = torch.randn(2, 5, 24)
        assert torch.equal(half(x), x)


def test_ffn_size_need_not_be_four_times_the_width() -> None:
    tensors = SequentialModel(build_gpt2(small(ffn_size=7))).logical_tensors()
    assert tensors["blocks.0.mlp.expand.weight"].shape == (7, 24)


def test_the_released_sizes_list_without_allocating() -> None:
    specs = build_gpt2(GPTConfig(preset="gpt2-xl"))
    assert len(specs) == 100
    assert not any(isinstance(spec, nn.Module) for spec in specs)


def test_a_sequence_longer_than_the_positions_is_refused() -> None:
    layer = PositionEmbedding(1, 4, dropout=0.0, init_std=0.02)
    with pytest.raises(ConfigError, match=r"2 tokens is longer than model\.max_positions=1"):
        layer(torch.zeros(1, 2, 4))


def test_a_vocabulary_of_unknown_size_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"model\.vocab_size=auto.*give a number"):
        build_gpt2(small(vocab_size="auto"))
