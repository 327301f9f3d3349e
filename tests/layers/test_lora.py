"""Low-rank adapters on linear layers: which get one, and what they compute on any number of tensor-parallel ranks."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pipekit.config import Config, parse_config
from pipekit.errors import ConfigError
from pipekit.layers.lora import add_lora, find_targets, is_adapter
from pipekit.layers.parameters import count_parameters, trained_and_frozen_shapes
from pipekit.layers.sequential import SequentialModel
from pipekit.layers.specs import LayerSpec, TiedLayerSpec, build_layer, spec_key
from pipekit.models import adapted_layers, build_layers, names_in_transformers
from pipekit.tensor_parallel import (
    ColumnParallelLinear,
    LowRank,
    PlannedGroup,
    RowParallelLinear,
    attach_adapters,
    shard_layer,
)
from pipekit.tensor_parallel import lora as low_rank_adapters
from pipekit.tensors.weight_gradients import deferring, split_linear
from tensor_parallel.outcomes import VOCAB, Outcome, assert_same, random_weights, run_sharded

LOW_RANK = LowRank(rank=3, scale=2.0)
KINDS: dict[str, dict[str, Any]] = {
    "gpt2": {"family": "gpt2"},
    "gpt2, grouped": {"family": "gpt2", "num_kv_heads": 2},
    "gpt_neox": {"family": "gpt_neox"},
    "gpt_neox, in halves": {"family": "gpt_neox", "use_parallel_residual": False},
    "llama": {"family": "llama"},
    "llama, one head of keys": {"family": "llama", "num_kv_heads": 1, "attention_bias": True, "mlp_bias": True},
    "qwen3": {"family": "qwen3", "num_kv_heads": 2, "tied_embedding": True},
    "gemma2": {"family": "gemma2", "num_kv_heads": 2, "head_size": 12, "sliding_window": 3},
    "olmo2": {"family": "olmo2", "num_kv_heads": 2},
    "phi3": {"family": "phi3", "num_kv_heads": 2},
}


def config_of(kind: str, **lora: Any) -> Config:
    sizes = {"vocab_size": VOCAB, "hidden_size": 32, "num_layers": 2, "num_heads": 4, "ffn_size": 26}
    model = {**sizes, "max_positions": 12, **KINDS[kind]}
    return parse_config(
        {"model": model, "train": {"steps": 1, "sequence_length": 12}, "lora": {"rank": 3, "alpha": 6.0, **lora}}
    )


def adapted(config: Config) -> list[LayerSpec]:
    return adapted_layers(config, build_layers(config))


@cache
def whole(kind: str, targets: tuple[str, ...]) -> tuple[dict[str, Tensor], Outcome]:
    specs = adapted(config_of(kind, targets=targets))
    weights = random_weights(specs)
    outcome = run_sharded(1, specs, weights, False)
    return weights, outcome._replace(loss=outcome.loss.double())


# Which linear layers


def test_a_packed_projection_is_a_target_for_each_of_its_parts() -> None:
    config = config_of("llama")
    found = find_targets(build_layers(config), names_in_transformers(config))
    assert [(each.module, each.part, each.first_row, each.end_row) for each in found[1]] == [
        ("blocks.0.attention.qkv", "q_proj", 0, 32),
        ("blocks.0.attention.qkv", "k_proj", 32, 64),
        ("blocks.0.attention.qkv", "v_proj", 64, 96),
        ("blocks.0.attention.projection", "o_proj", 0, 32),
    ]
    assert [each.theirs for each in found[2]] == [f"model.layers.0.mlp.{part}_proj" for part in ("gate", "up", "down")]
    assert found[0] == found[-1] == [], "neither the embedding nor the head"


@pytest.mark.parametrize(
    ("kind", "targets", "expected"),
    [
        ("llama", ["q_proj", "v_proj"], {"attention.qkv.lora.q_proj", "attention.qkv.lora.v_proj"}),
        ("llama", ["self_attn.o_proj"], {"attention.projection.lora.o_proj"}),
        ("llama", ["blocks.*.mlp.contract"], {"mlp.contract.lora.down_proj"}),
        ("llama, one head of keys", ["*.k_proj"], {"attention.kv.lora.k_proj"}),
        ("gpt2", ["c_attn"], {"attention.qkv.lora.c_attn"}),
        ("gpt2", ["c_proj"], {"attention.projection.lora.c_proj", "mlp.contract.lora.c_proj"}),
        ("gpt2, grouped", ["kv"], {"attention.kv.lora.kv"}),
        ("gpt_neox", ["query_key_value"], {"attention.qkv.lora.query_key_value"}),
        ("phi3", ["gate_up_proj"], {"mlp.gate_and_up.lora.gate_up_proj"}),
    ],
)
def test_patterns_name_linear_layers_here_or_in_transformers(kind: str, targets: list[str], expected: set[str]) -> None:
    specs = adapted(config_of(kind, targets=targets))
    names = {name for layer in trained_and_frozen_shapes(specs)[0] for name in layer}
    own = {f"blocks.{block}.{name}.{part}" for block in range(2) for name in expected for part in "ab"}
    assert names == own


def test_a_pattern_may_name_one_block() -> None:
    specs = adapted(config_of("llama", targets=["model.layers.1.*.q_proj"]))
    assert [spec.name for spec in specs if spec.adapters] == ["blocks.1.attention"]
    assert spec_key(specs[1]) != spec_key(specs[3]), "equal but for the adapter"


def test_nothing_but_adapters_is_trained_and_counted() -> None:
    specs = adapted(config_of("llama", targets=["q_proj", "down_proj"]))
    tensors = SequentialModel(specs).logical_tensors()
    assert {name for name, tensor in tensors.items() if tensor.requires_grad} == {*filter(is_adapter, tensors)}
    assert count_parameters(specs) == 2 * 3 * (32 + 32) + 2 * 3 * (26 + 32)


def test_adapters_add_nothing_at_first_and_leave_initial_weights_alone() -> None:
    config = config_of("gpt_neox")
    plain, ours = SequentialModel(build_layers(config)), SequentialModel(adapted(config))
    for name, tensor in plain.logical_tensors().items():
        assert torch.equal(tensor, ours.logical_tensors()[name]), name
    token_ids = torch.arange(12)[None]
    assert torch.equal(plain(token_ids), ours(token_ids))


# What they compute


SOME = ("v_proj", "up_proj", "c_attn", "query_key_value")


@pytest.mark.parametrize(
    ("kind", "targets", "size", "sequence_parallel"),
    [
        ("gpt2", ("*",), 2, True),
        ("gpt2, grouped", ("*",), 4, False),
        ("llama, one head of keys", SOME, 2, True),
        ("gpt_neox", SOME, 2, False),
        *(
            pytest.param(kind, targets, size, in_parts, marks=pytest.mark.slow)
            for kind in KINDS
            for targets in (("*",), SOME)
            for size in (2, 4)
            for in_parts in (False, True)
            if (kind, size) != ("phi3", 4)  # which cannot be shared out among more ranks than it has heads of keys
        ),
    ],
)
def test_ranks_together_compute_what_one_does(
    kind: str, targets: tuple[str, ...], size: int, sequence_parallel: bool
) -> None:
    config = config_of(kind)
    known = [each for layer in find_targets(build_layers(config), names_in_transformers(config)) for each in layer]
    targets = tuple(pattern for pattern in targets if any(each.is_meant(pattern) for each in known)) or ("q*",)
    weights, expected = whole(kind, targets)
    specs = adapted(config_of(kind, targets=targets))
    assert_same(run_sharded(size, specs, weights, sequence_parallel), expected)


@pytest.mark.parametrize(("kind", "size"), [("gpt2", 1), ("llama, one head of keys", 2)])
def test_their_gradients_may_be_put_off(kind: str, size: int) -> None:
    weights, expected = whole(kind, ("*",))
    assert_same(run_sharded(size, adapted(config_of(kind)), weights, True, defer=True), expected)


def test_outputs_are_those_of_a_linear_layer_with_the_product_added() -> None:
    spec, _ = add_lora([LayerSpec(nn.Linear, 5, 4, name="a"), LayerSpec(nn.Linear, 4, 4, name="b")], ["a"], LOW_RANK)
    layer: Any = build_layer(spec, name="a", seed=1)
    nn.init.normal_(layer.lora.a.b)
    x = torch.randn(2, 3, 5)
    merged = layer.weight + 2.0 * layer.lora.a.b @ layer.lora.a.a
    torch.testing.assert_close(layer(x), x @ merged.t() + layer.bias)
    torch.testing.assert_close(layer(input=x), layer(x))


def test_dropout_is_of_the_inputs_of_adapters_in_training_alone() -> None:
    (spec,) = add_lora([LayerSpec(nn.Linear, 500, 1, name="a")], ["*"], LowRank(rank=1, scale=1.0, dropout=0.5))
    layer: Any = build_layer(spec, name="a", seed=1)
    nn.init.ones_(layer.lora.a.a)
    nn.init.ones_(layer.lora.a.b)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    x = torch.ones(1, 500)
    assert layer.eval()(x).item() == 500
    drawn = layer.train()(x).item()
    assert drawn != 500
    assert drawn % 2 == 0, "what is left is doubled"
    assert abs(drawn - 500) < 100


def test_their_first_weights_are_drawn_as_those_of_a_linear_layer_of_torch() -> None:
    linear = nn.Linear(40, 4)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        expected = nn.Linear(40, 3, bias=False).weight
        torch.manual_seed(1)
        adapter = low_rank_adapters.LowRankAdapter(linear, [4], LOW_RANK)
    assert torch.equal(adapter.a, expected)
    assert not adapter.b.any()


@pytest.mark.parametrize(
    ("kind", "sequence_parallel", "is_shared"),
    [
        (ColumnParallelLinear, False, True),
        (ColumnParallelLinear, True, False),
        (RowParallelLinear, False, False),
    ],
)
def test_ranks_drop_the_same_of_inputs_that_they_share_and_their_own_of_shards(
    monkeypatch: pytest.MonkeyPatch, kind: type[nn.Linear], sequence_parallel: bool, is_shared: bool
) -> None:
    # What each rank has computed by itself, before it is exchanged.
    monkeypatch.setattr(low_rank_adapters, "column_parallel_linear", lambda reduced, *_, **__: reduced)
    monkeypatch.setattr(low_rank_adapters.LowRankAdapter, "sum_outputs", lambda self, reduced: reduced)
    drawn = []
    for rank in range(2):
        linear: Any = kind(64, 4)
        attach_adapters(linear, {"all": 4}, ["all"], LowRank(rank=1, scale=1.0, dropout=0.5))
        shard_layer(linear, PlannedGroup(rank, 2), sequence_parallel=sequence_parallel)
        nn.init.ones_(linear.lora.all.a)
        nn.init.ones_(linear.lora.all.b)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            drawn.append(linear.lora.all(torch.ones(20, linear.lora.all.a.shape[1])))
    assert torch.equal(*drawn) == is_shared


def test_frozen_weights_get_no_gradient_and_keep_no_inputs() -> None:
    config = config_of("llama", targets=["down_proj"])
    layer = build_layer(adapted(config)[2], name="mlp", seed=1)
    linear: Any = layer.get_submodule("gate_and_up")
    saved: list[Tensor] = []
    x = torch.randn(1, 12, 32, requires_grad=True)
    with (
        deferring() as later,
        split_linear(),
        torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda kept: kept),
    ):
        linear(x).sum().backward()
        assert [tensor.data_ptr() for tensor in saved] == [linear.weight.data_ptr()]
        layer(x).sum().backward()
    assert {id(weight) for weight in later.weights} == {id(each) for each in layer.parameters() if each.requires_grad}
    assert all(each.grad is None for each in layer.parameters() if not each.requires_grad)


# What cannot be


class Attention(nn.MultiheadAttention):
    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x, x, x)[0]


class Named(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lora = nn.Linear(4, 4)


@pytest.mark.parametrize(
    ("specs", "targets", "message"),
    [
        (
            [LayerSpec(nn.Linear, 4, 4, name="blocks.0")],
            ["bloks.0", "*"],
            r"^lora.targets: 'bloks.0' matches none of the model's linear layers; names end with 0$",
        ),
        (
            [LayerSpec(nn.Linear, 4, 4, name="body"), LayerSpec(nn.Linear, 4, 4, name="head")],
            ["haed"],
            r"^lora.targets: 'haed' matches none of the model's linear layers; try 'head'$",
        ),
        (
            [TiedLayerSpec("embed", nn.Linear, 4, 4), LayerSpec(nn.GELU)],
            ["*"],
            r"^lora.targets: the model has no nn.Linear outside of tied layers, to which LoRA could add$",
        ),
        (
            [LayerSpec(Attention, 4, 2, name="attention")],
            ["*"],
            r"^lora.targets: attention.out_proj is a NonDynamicallyQuantizableLinear, which may compute otherwise than "
            r"nn.Linear, so that no adapter can be added to it; give patterns that leave it out$",
        ),
        ([LayerSpec(Named, name="a")], ["*"], r"^lora: layer 'a' has a parameter 'lora.weight', and adapters have "),
    ],
)
def test_what_cannot_have_an_adapter_is_refused(specs: list[LayerSpec], targets: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        add_lora(specs, targets, LOW_RANK)


def test_parts_of_a_column_parallel_layer_are_whole_blocks() -> None:
    from pipekit.models.family import TensorRename

    specs = [LayerSpec(ColumnParallelLinear, 4, 6, name="a")]
    renames = [TensorRename("a.weight", rows={"q.weight": 2, "k.weight": 4})]
    specs = add_lora(specs, ["q"], LOW_RANK, renames)
    with pytest.raises(ConfigError, match=r"^lora: q is rows 0 to 1 of a column-parallel layer with blocks=\[6\]"):
        build_layer(specs[0], name="a", seed=1)
