"""Counting parameters without allocating any."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from pipekit.errors import ConfigError, LayoutError
from pipekit.layers.parameters import count_layer_parameters, count_parameters, parameter_shapes
from pipekit.layers.specs import LayerSpec, TiedLayerSpec
from pipekit.models.gpt2 import GPT2Config


@pytest.mark.parametrize(
    ("preset", "expected"),
    [
        ("gpt2", 124_439_808),
        ("gpt2-medium", 354_823_168),
        ("gpt2-large", 774_030_080),
        ("gpt2-xl", 1_557_611_200),
    ],
)
def test_the_released_models_have_their_known_sizes(preset: Any, expected: int) -> None:
    config = GPT2Config(preset=preset)
    assert count_parameters(config.layer_specs()) == expected
    stored = config.hf_config(end_token_id=0, dtype="float32")
    with torch.device("meta"):
        theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config.from_dict(stored))
    assert theirs.num_parameters() == expected


def test_a_tied_layer_counts_once_in_the_model_and_on_each_stage_that_holds_it() -> None:
    specs = GPT2Config(preset="gpt2").layer_specs()
    layers = count_layer_parameters(specs)
    assert layers[0] == layers[-1] == 50257 * 768
    assert sum(layers) - count_parameters(specs) == 50257 * 768
    untied = GPT2Config(preset="gpt2", tied_embedding=False).layer_specs()
    assert count_parameters(untied) == sum(count_layer_parameters(untied)) == sum(layers)


def test_a_trillion_parameters_are_counted_at_once_and_without_memory() -> None:
    config = GPT2Config(vocab_size=256_000, hidden_size=25_600, num_layers=128, num_heads=160, max_positions=8192)
    start = time.process_time()
    total = count_parameters(config.layer_specs())
    assert time.process_time() - start < 10  # most of it is the first use of the meta device
    blocks = 128 * (12 * 25_600**2 + 13 * 25_600)
    assert total == blocks + (256_000 + 8192 + 2) * 25_600
    assert total > 10**12


def test_only_trainable_parameters_count() -> None:
    class Frozen(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Parameter(torch.empty(3))
            self.b = nn.Parameter(torch.empty(5), requires_grad=False)
            self.register_buffer("c", torch.empty(7))

    assert count_layer_parameters([LayerSpec(Frozen)]) == [3]


def test_a_parameter_that_a_layer_uses_twice_counts_once() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(4, 4, bias=False)
            self.b = nn.Linear(4, 4, bias=False)
            self.b.weight = self.a.weight

    assert count_layer_parameters([LayerSpec(Shared)]) == [16]


def test_each_distinct_spec_is_built_once() -> None:
    built: list[object] = []

    class Counted(nn.Module):
        def __init__(self, size: int, options: object = None) -> None:
            super().__init__()
            built.append((size, options))
            self.weight = nn.Parameter(torch.empty(size))

    specs = [LayerSpec(Counted, size, options={"deep": [size]}) for size in (1, 2, 1, 2, 1)]
    assert count_layer_parameters(specs) == [1, 2, 1, 2, 1]
    assert built == [(1, {"deep": [1]}), (2, {"deep": [2]})]


def test_arguments_that_look_alike_are_not_taken_for_equal() -> None:
    class Size:
        __hash__ = None  # type: ignore[assignment]

        def __init__(self, value: int) -> None:
            self.value = value

        def __repr__(self) -> str:
            return "Size"

    class Sized(nn.Module):
        def __init__(self, size: Size) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.empty(size.value))

    assert count_layer_parameters([LayerSpec(Sized, Size(3)), LayerSpec(Sized, Size(4))]) == [3, 4]


@pytest.mark.parametrize("read", ["item", "tolist", "numpy"])
def test_a_layer_that_reads_values_while_it_is_built_is_counted_too(read: str) -> None:
    class Reads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            getattr(torch.ones(1), read)()
            self.weight = nn.Parameter(torch.empty(6))

    assert count_layer_parameters([LayerSpec(Reads)]) == [6]


def test_counting_does_not_draw_random_numbers() -> None:
    class Draws(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(2, device="cpu"))

    before = torch.get_rng_state()
    count_layer_parameters([LayerSpec(Draws), LayerSpec(nn.Linear, 3, 3)])
    assert torch.equal(torch.get_rng_state(), before)


def test_arguments_that_do_not_fit_are_named_with_the_layer() -> None:
    with pytest.raises(
        ConfigError, match=r"^layer 'layers\.1' cannot be built from LayerSpec\(Linear, 4\): .*out_features"
    ):
        count_layer_parameters([LayerSpec(nn.Linear, 4, 4), LayerSpec(nn.Linear, 4)])


def test_a_model_may_hold_several_tied_keys() -> None:
    specs = [TiedLayerSpec(key, nn.Linear, 2, 2) for key in ("a", "b", "a", "b", "a")]
    assert count_parameters(specs) == 12


def test_a_tensor_parallel_rank_has_its_part_of_matrices_and_all_of_norms_and_positions() -> None:
    config = GPT2Config(vocab_size=67, hidden_size=32, num_layers=1, num_heads=4, num_kv_heads=2, max_positions=16)
    shapes = {name: shape for layer in parameter_shapes(config.layer_specs(), tp=4) for name, shape in layer.items()}
    assert shapes == {
        "embed.weight": (17, 32),
        "position.weight": (16, 32),
        "blocks.0.attention.norm.weight": (32,),
        "blocks.0.attention.norm.bias": (32,),
        "blocks.0.attention.q.weight": (8, 32),
        "blocks.0.attention.q.bias": (8,),
        "blocks.0.attention.kv.weight": (32, 32),  # fewer heads than ranks: all of them
        "blocks.0.attention.kv.bias": (32,),
        "blocks.0.attention.projection.weight": (32, 8),
        "blocks.0.attention.projection.bias": (32,),
        "blocks.0.mlp.norm.weight": (32,),
        "blocks.0.mlp.norm.bias": (32,),
        "blocks.0.mlp.expand.weight": (32, 32),
        "blocks.0.mlp.expand.bias": (32,),
        "blocks.0.mlp.contract.weight": (32, 32),
        "blocks.0.mlp.contract.bias": (32,),
        "final_norm.weight": (32,),
        "final_norm.bias": (32,),
    }


def test_a_layer_that_cannot_be_shared_out_is_named() -> None:
    config = GPT2Config(vocab_size=67, hidden_size=24, num_layers=1, num_heads=3, max_positions=16)
    with pytest.raises(LayoutError, match=r"layer 'blocks.0.attention': .*model.num_heads=3.*try parallel.tp=1"):
        parameter_shapes(config.layer_specs(), tp=2)
