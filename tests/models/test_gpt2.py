"""GPT-2 as a list of layer specs."""

from __future__ import annotations

import math
import threading
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipekit.errors import ConfigError, LayoutError
from pipekit.layers.sequential import SequentialModel
from pipekit.layers.specs import LayerSpec, TiedLayerSpec, build_layer, flow_of_spec, layer_names
from pipekit.models.gpt2 import GPT2Config
from pipekit.models.transformer import AttentionHalf, Head, PositionEmbedding, language_model_loss
from pipekit.tensor_parallel import (
    SHARDED,
    Logits,
    PlannedGroup,
    SequenceFlow,
    shard_layer,
)
from tensor_parallel.outcomes import Outcome, assert_same, random_weights, run_sharded, tokens_and_labels
from tensor_parallel.sharded_model import CutModel, join_gradients, join_parameters
from tensor_parallel.threads import run_ranks
from their_models import assert_their_model_is_ours


def small(**changes: Any) -> GPT2Config:
    sizes: dict[str, Any] = {
        "vocab_size": 61,
        "hidden_size": 24,
        "num_layers": 2,
        "num_heads": 3,
        "max_positions": 10,
    }
    return GPT2Config(**{**sizes, **changes})


def test_the_layers_are_named_in_order() -> None:
    assert layer_names(small(tied_embedding=False).layer_specs()) == [
        "embed",
        "position",
        "blocks.0.attention",
        "blocks.0.mlp",
        "blocks.1.attention",
        "blocks.1.mlp",
        "final_norm",
        "head",
    ]
    tied = small().layer_specs()
    assert layer_names(tied)[-1] == "embed"
    assert [isinstance(spec, TiedLayerSpec) for spec in tied] == [True, *[False] * 6, True]


@pytest.mark.parametrize("num_layers", [1, 5])
def test_the_configuration_knows_how_many_layers_there_are(num_layers: int) -> None:
    config = small(num_layers=num_layers)
    assert len(config.layer_specs()) == config.num_layer_specs


@pytest.mark.parametrize("tied", [True, False])
def test_tensors_have_logical_names_and_a_tied_one_is_held_once(tied: bool) -> None:
    tensors = SequentialModel(small(num_layers=1, tied_embedding=tied).layer_specs()).logical_tensors()
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
    for index, spec in enumerate(specs := small(tied_embedding=False).layer_specs()):
        x = spec.build()(x)
        assert x.shape == (3, 10, 61 if index == len(specs) - 1 else 24)


def test_a_token_sees_only_those_before_it() -> None:
    model = SequentialModel(small(init_std=0.5).layer_specs()).eval()
    tokens = torch.randint(61, (2, 10), generator=torch.Generator().manual_seed(0))
    changed = tokens.clone()
    changed[:, 6] = (changed[:, 6] + 1) % 61
    before, after = model(tokens), model(changed)
    torch.testing.assert_close(before[:, :6], after[:, :6], rtol=0, atol=1e-6)
    assert ((before - after).abs().amax(dim=(0, 2))[6:] > 1e-3).all()


def test_initial_weights_are_those_of_gpt2() -> None:
    config = small(hidden_size=192, num_layers=8, vocab_size=4000, max_positions=300, init_std=0.02)
    tensors = SequentialModel(config.layer_specs(), seed=3).logical_tensors()
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
    model = SequentialModel(small(dropout=0.5, init_std=0.3).layer_specs())
    tokens = torch.randint(61, (1, 8))
    assert not torch.equal(model(tokens), model(tokens))
    model.eval()
    assert torch.equal(model(tokens), model(tokens))


@pytest.mark.parametrize("layer_idx", [1, 2, 3], ids=["position", "attention", "mlp"])
def test_every_layer_with_dropout_drops(layer_idx: int) -> None:
    layer = small(dropout=0.5, init_std=0.3).layer_specs()[layer_idx].build()
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
    for spec in small().layer_specs()[2:4]:
        half = spec.build()
        with torch.no_grad():
            (half.projection if hasattr(half, "projection") else half.contract).weight.zero_()  # type: ignore[union-attr, operator]
        x = torch.randn(2, 5, 24)
        assert torch.equal(half(x), x)


def test_ffn_size_need_not_be_four_times_the_width() -> None:
    tensors = SequentialModel(small(ffn_size=7).layer_specs()).logical_tensors()
    assert tensors["blocks.0.mlp.expand.weight"].shape == (7, 24)


def test_the_released_sizes_list_without_allocating() -> None:
    specs = GPT2Config(preset="gpt2-xl").layer_specs()
    assert len(specs) == 100
    assert not any(isinstance(spec, nn.Module) for spec in specs)


def test_a_sequence_longer_than_the_positions_is_refused() -> None:
    layer = PositionEmbedding(1, 4, dropout=0.0, init_std=0.02)
    with pytest.raises(ConfigError, match=r"2 tokens is longer than model\.max_positions=1"):
        layer(torch.zeros(1, 2, 4))


def test_a_vocabulary_of_unknown_size_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"model\.vocab_size=auto.*give a number"):
        small(vocab_size="auto").layer_specs()


# Against plain torch


def for_ranks(**changes: Any) -> GPT2Config:
    """Return the sizes of a model that four ranks can share out; they need not divide its vocabulary."""
    sizes = {"vocab_size": 23, "hidden_size": 16, "num_heads": 4, "ffn_size": 26, "max_positions": 12}
    return small(**{**sizes, **changes})


def plain_gpt(weights: dict[str, Tensor], config: GPT2Config, tokens: Tensor) -> Tensor:
    """Return the logits of GPT-2 with these logical tensors, of torch's operations only."""
    width, heads, eps = config.hidden_size, config.num_heads, config.layer_norm_eps
    kv_heads = config.num_kv_heads or heads
    length = tokens.shape[1]
    future = torch.ones(length, length, dtype=torch.bool).triu(1)

    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, (width,), weights[f"{name}.weight"], weights[f"{name}.bias"], eps)

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    x = weights["embed.weight"][tokens] + weights["position.weight"][:length]
    for block in range(config.num_layers):
        name = f"blocks.{block}.attention"
        y = norm(x, f"{name}.norm")
        if kv_heads == heads:
            q, k, v = linear(y, f"{name}.qkv").chunk(3, -1)
        else:
            q, (k, v) = linear(y, f"{name}.q"), linear(y, f"{name}.kv").chunk(2, -1)
        q = q.unflatten(-1, (heads, -1)).transpose(1, 2)
        k, v = (each.unflatten(-1, (kv_heads, -1)).transpose(1, 2) for each in (k, v))
        k, v = (each.repeat_interleave(heads // kv_heads, 1) for each in (k, v))
        scores = q @ k.transpose(2, 3) / math.sqrt(width // heads)
        y = scores.masked_fill(future, -math.inf).softmax(-1) @ v
        x = x + linear(y.transpose(1, 2).flatten(2), f"{name}.projection")
        name = f"blocks.{block}.mlp"
        y = F.gelu(linear(norm(x, f"{name}.norm"), f"{name}.expand"), approximate="tanh")
        x = x + linear(y, f"{name}.contract")
    return norm(x, "final_norm") @ weights.get("head.weight", weights["embed.weight"]).T


@cache
def plain_outcome(tied: bool, num_kv_heads: int | None) -> Outcome:
    config = for_ranks(tied_embedding=tied, num_kv_heads=num_kv_heads)
    weights = {name: tensor.requires_grad_() for name, tensor in random_weights(config.layer_specs()).items()}
    tokens, labels = tokens_and_labels()
    logits = plain_gpt(weights, config, tokens)
    loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
    loss.backward()  # type: ignore[no-untyped-call]
    gradients = {name: tensor.grad for name, tensor in weights.items() if tensor.grad is not None}
    assert gradients.keys() == weights.keys()
    return Outcome(logits.detach(), loss.detach(), gradients)


grouped_queries = pytest.mark.parametrize("num_kv_heads", [None, 1, 2], ids=["4 heads", "1 kv head", "2 kv heads"])
tying = pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
sequences = pytest.mark.parametrize("sequence_parallel", [False, True], ids=["whole sequence", "sequence parallel"])


@grouped_queries
@tying
def test_the_model_is_gpt2(tied: bool, num_kv_heads: int | None) -> None:
    config = for_ranks(tied_embedding=tied, num_kv_heads=num_kv_heads)
    specs = config.layer_specs()
    model = CutModel(specs, None, sequence_parallel=False, weights=random_weights(specs))
    tokens, labels = tokens_and_labels()
    logits = model(tokens)
    loss = language_model_loss(logits, labels)
    loss.backward()  # type: ignore[no-untyped-call]
    actual = Outcome(logits.detach(), loss.detach(), join_gradients([model.parameters()]))
    assert_same(actual, plain_outcome(tied, num_kv_heads))


@tying
@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)], ids=["fp32", "bf16"])
def test_a_model_of_theirs_computes_the_same_here(tmp_path: Path, tied: bool, dtype: torch.dtype, rtol: float) -> None:
    assert_their_model_is_ours(for_ranks(tied_embedding=tied), tmp_path, dtype=dtype, rtol=rtol)


@sequences
@grouped_queries
@tying
@pytest.mark.parametrize("size", [1, 2, 4])
def test_ranks_together_compute_what_one_process_does(
    size: int, tied: bool, num_kv_heads: int | None, sequence_parallel: bool
) -> None:
    specs = for_ranks(tied_embedding=tied, num_kv_heads=num_kv_heads).layer_specs()
    actual = run_sharded(size, specs, random_weights(specs), sequence_parallel)
    assert_same(actual, plain_outcome(tied, num_kv_heads))


@sequences
@tying
@pytest.mark.parametrize("size", [1, 4])
def test_the_loss_may_go_through_the_tokens_in_chunks(size: int, tied: bool, sequence_parallel: bool) -> None:
    specs = for_ranks(tied_embedding=tied).layer_specs(loss_chunk_tokens=3)
    assert_same(run_sharded(size, specs, random_weights(specs), sequence_parallel), plain_outcome(tied, None))


@grouped_queries
@tying
@pytest.mark.parametrize("size", [2, 4])
def test_initial_weights_do_not_depend_on_the_ranks(size: int, tied: bool, num_kv_heads: int | None) -> None:
    specs = for_ranks(tied_embedding=tied, num_kv_heads=num_kv_heads).layer_specs()
    whole = SequentialModel(specs, seed=7).logical_tensors()
    ranks = [
        CutModel(specs, PlannedGroup(rank, size), sequence_parallel=True, seed=7, dtype=torch.float32).parameters()
        for rank in range(size)
    ]
    joined = join_parameters(ranks)
    assert joined.keys() == whole.keys()
    for name, tensor in joined.items():
        assert torch.equal(tensor, whole[name]), name


@pytest.mark.parametrize("num_kv_heads", [None, 1])
def test_heads_that_the_ranks_do_not_divide_are_refused(num_kv_heads: int | None) -> None:
    spec = for_ranks(num_kv_heads=num_kv_heads).layer_specs()[2]
    with pytest.raises(LayoutError, match=r"tp=6 does not divide model\.num_heads=4.*try parallel\.tp=1, 2 or 4$"):
        shard_layer(spec.build(), PlannedGroup(0, 6), sequence_parallel=True)


def test_logits_that_are_shared_out_are_not_computed_before_the_loss_asks() -> None:
    head = Head(4, 23, init_std=1.0)
    assert isinstance(head(torch.ones(1, 2, 4)), Tensor)
    shard_layer(head, PlannedGroup(2, 4), sequence_parallel=True)
    assert head.weight.shape == (6, 4)
    logits = head(torch.ones(1, 2, 4))
    assert isinstance(logits, Logits)
    assert logits.shape == (1, 8, 23)


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_positions_of_a_part_are_those_of_the_whole_sequence(sequence_parallel: bool) -> None:
    for rank in range(3):
        layer = PositionEmbedding(12, 4, dropout=0.0, init_std=1.0)
        shard_layer(layer, PlannedGroup(rank, 3), sequence_parallel=sequence_parallel)
        first = 4 * rank if sequence_parallel else 0
        assert torch.equal(layer(torch.zeros(1, 4, 4))[0], layer.weight[first : first + 4])
        if sequence_parallel:
            with pytest.raises(ConfigError, match=r"15 tokens is longer than model\.max_positions=12"):
                layer(torch.zeros(1, 5, 4))


@tying
def test_the_sequence_stays_in_parts_from_the_embedding_to_the_head(tied: bool) -> None:
    first, *between, last = [flow_of_spec(spec) for spec in for_ranks(tied_embedding=tied).layer_specs()]
    assert first == SequenceFlow(returns_shard=True)
    assert set(between) == {SHARDED}
    assert last == SequenceFlow(takes_shard=True)


# Dropout


def ranks_from_one_seed(
    spec: LayerSpec, sequence_parallel: bool, prepare: Any, x: Tensor
) -> list[tuple[Tensor, Tensor]]:
    """Return each rank's output, and the generator's state after it; the ranks run one after the other."""
    results = []
    for rank in range(2):
        layer = build_layer(spec, name="layer", seed=0)
        with torch.no_grad():
            prepare(layer)
        shard_layer(layer, PlannedGroup(rank, 2), sequence_parallel=sequence_parallel)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(11)
            results.append((layer(x).detach(), torch.get_rng_state()))
    return results


def one_from_every_linear(layer: nn.Module) -> None:
    """Make a half block add one to everything, before dropout; the position embedding too."""
    for name, parameter in layer.named_parameters():
        if name.startswith(("projection", "contract")):
            parameter.fill_(float(name.endswith("bias")))
        elif isinstance(layer, PositionEmbedding):
            parameter.fill_(1)


@pytest.mark.parametrize("sequence_parallel", [False, True], ids=["whole", "in parts"])
@pytest.mark.parametrize("layer_idx", [1, 2, 3], ids=["position", "attention", "mlp"])
def test_ranks_drop_a_whole_activation_alike_and_each_its_own_part_by_itself(
    layer_idx: int, sequence_parallel: bool
) -> None:
    spec = for_ranks(dropout=0.5).layer_specs()[layer_idx]
    (first, state), (second, other_state) = ranks_from_one_seed(
        spec, sequence_parallel, one_from_every_linear, torch.zeros(2, 6, 16)
    )
    assert set(first.unique().tolist()) == {0.0, 2.0}
    assert torch.equal(first, second) == (not sequence_parallel)
    assert torch.equal(state, other_state), "the next layer would draw differently"


@pytest.mark.parametrize("sequence_parallel", [False, True], ids=["whole", "in parts"])
def test_ranks_drop_what_tokens_look_at_by_themselves(sequence_parallel: bool) -> None:
    def every_value_is_one(layer: nn.Module) -> None:
        assert isinstance(layer, AttentionHalf)
        assert layer.qkv is not None
        layer.qkv.weight.zero_()
        layer.qkv.bias.fill_(1)

    dropped: list[Tensor] = []

    def catch(module: nn.Module, taken: tuple[Tensor]) -> None:
        dropped.append(taken[0].detach())

    def prepare(layer: nn.Module) -> None:
        every_value_is_one(layer)
        layer.get_submodule("projection").register_forward_pre_hook(catch)

    spec = for_ranks(dropout=0.5).layer_specs()[2]
    (_, state), (_, other_state) = ranks_from_one_seed(spec, sequence_parallel, prepare, torch.randn(2, 6, 16))
    assert not torch.equal(dropped[0], dropped[1]), "the ranks' heads are different ones"
    assert torch.equal(state, other_state)


@pytest.mark.parametrize("layer_idx", [1, 2, 3], ids=["position", "attention", "mlp"])
def test_ranks_drop_nothing_in_evaluation(layer_idx: int) -> None:
    spec = for_ranks(dropout=0.5).layer_specs()[layer_idx]

    def prepare(layer: nn.Module) -> None:
        one_from_every_linear(layer)
        layer.eval()

    for output, _ in ranks_from_one_seed(spec, True, prepare, torch.zeros(2, 6, 16)):
        assert torch.equal(output, torch.ones(2, 6, 16))


# Layers of the user's own between them

_drawing = threading.Lock()


class Mixer(nn.Module):
    """Knows nothing of tensor parallelism: attends to everything, drops out, and passes a mask on beside its output."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.before = nn.Linear(width, width)
        self.attention = nn.MultiheadAttention(width, 2, batch_first=True)

    def forward(self, x: Tensor) -> dict[str, Any]:
        y, _ = self.attention(self.before(x), x, x, need_weights=False)
        # As the engine does, every rank seeds a layer alike; ranks are threads here, which share the generator.
        with _drawing, torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            y = F.dropout(y, 0.3)
        return {"pair": (x + y, None), "mask": torch.ones(x.shape[:2], dtype=torch.bool)}


class Unpack(nn.Module):
    """Takes the whole sequence of what came before."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(width))

    def forward(self, inputs: dict[str, Any]) -> Tensor:
        x = inputs["pair"][0]
        assert inputs["mask"].shape == x.shape[:2], "tokens and mask are of different lengths"
        return x.cumsum(1) * self.scale  # type: ignore[no-any-return]


class UnpackParts(Unpack):
    """Takes this rank's part of the sequence, and the whole mask."""

    sequence_flow = SHARDED

    def forward(self, inputs: dict[str, Any]) -> Tensor:
        assert inputs["mask"].shape == (2, 8)
        return inputs["pair"][0] * self.scale  # type: ignore[no-any-return]


@sequences
@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("unpack", [Unpack, UnpackParts])
def test_a_users_layer_need_not_know_of_it(unpack: type[Unpack], size: int, sequence_parallel: bool) -> None:
    specs = for_ranks().layer_specs()
    specs[3:3] = [LayerSpec(Mixer, 16, name="mixer"), LayerSpec(unpack, 16, name="unpack")]
    weights = random_weights(specs)
    tokens, labels = tokens_and_labels()
    model = CutModel(specs, None, sequence_parallel=False, weights=weights)
    logits = model(tokens)
    loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
    loss.backward()  # type: ignore[no-untyped-call]
    expected = Outcome(logits.detach(), loss.detach(), join_gradients([model.parameters()]))
    assert_same(run_sharded(size, specs, weights, sequence_parallel), expected)


@pytest.mark.parametrize("size", [2, 4])
def test_a_users_layer_may_come_last(size: int) -> None:
    """Its peers gather what it takes; a loss of the whole is the same on all of them."""
    specs = [*for_ranks().layer_specs()[:4], LayerSpec(nn.Linear, 16, 23, name="scores")]
    weights = random_weights(specs)
    tokens, labels = tokens_and_labels()
    model = CutModel(specs, None, sequence_parallel=False, weights=weights)
    logits = model(tokens)
    loss = F.cross_entropy(logits.float().flatten(0, 1), labels.flatten())
    loss.backward()  # type: ignore[no-untyped-call]
    expected = Outcome(logits.detach(), loss.detach().double(), join_gradients([model.parameters()]))
    assert_same(run_sharded(size, specs, weights, True), expected)


@pytest.mark.parametrize("size", [2, 4])
def test_a_model_that_ends_in_parts_returns_the_whole_sequence(size: int) -> None:
    specs = for_ranks().layer_specs()[:-1]
    weights, (tokens, _) = random_weights(specs), tokens_and_labels()
    expected = CutModel(specs, None, sequence_parallel=False, weights=weights)(tokens)
    for actual in run_ranks(
        size, lambda group: CutModel(specs, group, sequence_parallel=True, weights=weights)(tokens)
    ):
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)
