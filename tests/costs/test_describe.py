"""Costs of layers, against published formulas, torch's own counter, and what real runs keep."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from pipekit.costs.describe import describe_layers
from pipekit.errors import ConfigError
from pipekit.layers.specs import LayerSpec, TiedLayerSpec
from pipekit.models.gpt2 import GPT2Config
from pipekit.models.transformer import language_model_loss
from pipekit.predictions.kernels import Product, Work
from pipekit.predictions.layer_costs import stage_activation_bytes

ROOT = Path(__file__).resolve().parents[2]


def token_ids(batch: int, num_tokens: int) -> Tensor:
    return torch.empty(batch, num_tokens, dtype=torch.int64, device="meta")


def gpt(**changes: Any) -> list[LayerSpec]:
    settings: dict[str, Any] = {"preset": "tiny", "vocab_size": 512, "dropout": 0.0} | changes
    return GPT2Config(**settings).layer_specs()


@pytest.mark.parametrize(("num_tokens", "tied"), [(256, True), (1024, False), (2048, True)])
def test_a_gpt_takes_the_operations_of_the_published_formula(num_tokens: int, tied: bool) -> None:
    """Narayanan et al. 2021, "Efficient Large-Scale Language Model Training on GPU Clusters", section 5.1."""
    batch, layers, width, vocabulary = 4, 2, 1024, 51_200
    specs = gpt(
        num_layers=layers,
        hidden_size=width,
        num_heads=16,
        vocab_size=vocabulary,
        max_positions=num_tokens,
        tied_embedding=tied,
    )
    costs = describe_layers(specs, token_ids(batch, num_tokens), dtype=torch.bfloat16).layers
    forward = (
        24
        * batch
        * num_tokens
        * layers
        * width**2
        * (1 + num_tokens / (6 * width) + vocabulary / (12 * layers * width))
    )
    assert sum(layer.forward_flops for layer in costs) == pytest.approx(forward, rel=0.01)
    # A fused attention makes the products of queries and keys again in its backward, which the formula leaves out.
    again = 2 * batch * num_tokens**2 * width * layers
    assert sum(layer.flops for layer in costs) - again == pytest.approx(3 * forward, rel=0.01)


def test_operations_are_those_of_products_and_attentions() -> None:
    specs = gpt(num_layers=1, hidden_size=128, num_heads=4)
    ids = token_ids(2, 16)
    costs = describe_layers(specs, ids, dtype=torch.bfloat16, loss_fn=language_model_loss, labels=ids).layers
    x = torch.empty(3, 6, 10, device="meta", requires_grad=True)
    (convolutions,) = describe_layers([LayerSpec(Convolutions)], x, dtype=torch.float32).layers
    assert convolutions.work is not None
    assert convolutions.work.forward.other_flops > 0
    for layer in (*costs, convolutions):
        assert layer.work is not None
        for name in ("forward", "input_gradient", "weight_gradient"):
            work = getattr(layer.work, name)
            counted = sum(2 * each.batch * each.m * each.n * each.k for each in work.products)
            counted += work.other_flops + sum(each.flops for each in work.attentions)
            assert counted == getattr(layer, f"{name}_flops")
        assert all(each.is_causal and each.length == 16 for each in layer.work.forward.attentions)


def test_recomputation_ends_with_the_last_tensor_that_is_kept() -> None:
    # As torch's checkpoint does: the last product of a layer keeps its input, and its output is not needed again.
    for dropout, is_whole in ((0.0, False), (0.1, True)):
        specs = gpt(num_layers=1, hidden_size=128, num_heads=4, dropout=dropout)
        for layer in describe_layers(specs, token_ids(2, 16), dtype=torch.bfloat16).layers[2:4]:
            assert layer.work is not None
            forward, recomputed = layer.work.forward, layer.work.recomputed
            assert recomputed.products == (forward.products if is_whole else forward.products[:-1])
            assert recomputed.attentions == forward.attentions
            assert replace(layer, is_recomputed=True).recomputed_flops == recomputed.flops


def count_forwards(layer: nn.Module, x: Tensor) -> list[int]:
    """Numbers of operations of a layer's forward, and of its recomputation."""
    counts = []
    with FlopCounterMode(display=False) as counter:
        y = checkpoint(layer, x, use_reentrant=False)
        counts.append(counter.get_total_flops())
    with FlopCounterMode(display=False) as counter:
        y.sum().backward()
    with FlopCounterMode(display=False) as plain:
        layer(x).sum().backward()
    # The backward of a plain run is that of this one without what is recomputed.
    return [*counts, counter.get_total_flops() - (plain.get_total_flops() - counts[0])]


def test_recomputation_is_as_long_as_that_of_torchs_checkpoint() -> None:
    layer, x = Stack(8), torch.randn(4, 8, requires_grad=True)
    (costs,) = describe_layers([LayerSpec(Stack, 8)], x, dtype=torch.float32).layers
    assert [costs.forward_flops, replace(costs, is_recomputed=True).recomputed_flops] == count_forwards(layer, x)


class Stack(nn.Sequential):
    """Two linear layers with an activation function between them."""

    def __init__(self, width: int) -> None:
        super().__init__(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))


def test_kernels_that_are_no_products_move_what_they_read_and_write() -> None:
    x = torch.empty(4, 8, dtype=torch.bfloat16, device="meta", requires_grad=True)
    specs = [LayerSpec(nn.LayerNorm, 8), LayerSpec(nn.Linear, 8, 16, bias=False), LayerSpec(nn.GELU)]
    norm, linear, gelu = (layer.work for layer in describe_layers(specs, x, dtype=torch.bfloat16).layers)
    assert norm is not None and linear is not None and gelu is not None  # noqa: PT018
    # Input, output, weight and bias in 2 bytes, and the mean and deviation of each row in 4.
    assert norm.forward.moved_bytes == 2 * (32 + 32 + 8 + 8) + 4 * (4 + 4)
    assert norm.forward.whole_bytes == norm.forward.moved_bytes
    assert (linear.forward.moved_bytes, linear.forward.products) == (0, (Product(1, 4, 16, 8),))
    assert linear.input_gradient.products == (Product(1, 4, 8, 16),)
    assert linear.weight_gradient.products == (Product(1, 16, 8, 4),)
    # The views of a transposed weight move nothing; an activation function reads one tensor and writes one.
    assert gelu.forward == Work(moved_bytes=2 * (64 + 64), whole_bytes=2 * (64 + 64), num_kernels=1)
    assert gelu.input_gradient.moved_bytes == 2 * 3 * 64


class Mixing(nn.Module):
    """A norm, a product, a copy as large as the input, a product, and an addition: a feed-forward in short."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, width, bias=False)
        self.down = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.up(self.norm(x)).clone())


def test_between_two_products_tensor_parallel_ranks_have_shards_and_the_whole_around_them() -> None:
    x = torch.empty(4, 8, dtype=torch.bfloat16, device="meta", requires_grad=True)
    (mixing,) = (layer.work for layer in describe_layers([LayerSpec(Mixing, 8)], x, dtype=torch.bfloat16).layers)
    (norm,) = (layer.work for layer in describe_layers([LayerSpec(nn.LayerNorm, 8)], x, dtype=torch.bfloat16).layers)
    assert mixing is not None and norm is not None  # noqa: PT018
    copied, added = 2 * 2 * 32, 2 * 3 * 32
    assert mixing.forward.moved_bytes == norm.forward.moved_bytes + copied + added
    assert mixing.forward.whole_bytes == norm.forward.moved_bytes + added


def test_the_scores_that_a_loss_is_given_are_shards() -> None:
    x = torch.empty(4, 8, dtype=torch.bfloat16, device="meta", requires_grad=True)
    costs = describe_layers([LayerSpec(nn.GELU)], x, dtype=torch.bfloat16, loss_fn=nn.functional.mse_loss, labels=x)
    assert costs.loss is not None
    assert costs.loss.work is not None
    assert costs.loss.work.forward.moved_bytes > 0
    assert costs.loss.work.forward.whole_bytes == 0


def test_the_first_layer_computes_no_gradient_of_token_ids() -> None:
    costs = describe_layers(gpt(), token_ids(2, 8), dtype=torch.float32).layers
    assert costs[0].input_gradient_flops == 0
    assert costs[0].input_bytes == 2 * 8 * 8
    assert all(layer.input_gradient_flops > 0 for layer in costs[2:4])


class Convolutions(nn.Module):
    """Products of every kind that is counted."""

    def __init__(self) -> None:
        super().__init__()
        self.inward = nn.Conv1d(6, 8, 3, padding=1)
        self.outward = nn.ConvTranspose1d(8, 6, 3, padding=1)
        self.attend = nn.Parameter(torch.zeros(6, 6))

    def forward(self, x: Tensor) -> Tensor:
        y = self.outward(F.relu(self.inward(x)))
        y = torch.baddbmm(y, self.attend.expand(len(x), 6, 6), y)
        return y + torch.softmax(x @ x.transpose(1, 2), -1) @ x


def test_operations_are_those_of_torchs_own_counter() -> None:
    costs = describe_layers(
        [LayerSpec(nn.Conv1d, 6, 6, 1), LayerSpec(Convolutions)], torch.zeros(3, 6, 10), dtype=torch.float32
    ).layers[1]
    layer, x = Convolutions(), torch.zeros(3, 6, 10, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        y = layer(x)
    assert costs.forward_flops == counter.get_total_flops()
    with FlopCounterMode(display=False) as counter:
        torch.autograd.grad(y, x, torch.ones_like(y), retain_graph=True)
    assert costs.input_gradient_flops == counter.get_total_flops()
    with FlopCounterMode(display=False) as counter:
        y.sum().backward()
    assert costs.input_gradient_flops + costs.weight_gradient_flops == counter.get_total_flops()


def bytes_kept(specs: Sequence[LayerSpec], inputs: Tensor, *, dtype: torch.dtype, labels: Tensor | None = None) -> int:
    """Return what a stage holds of a micro-batch after its forward: a real one, on the CPU."""
    layers = [spec.build().to(dtype) for spec in specs]
    storages: dict[int, int] = {}
    # Kept, so that no storage gets the address of one that is gone.
    alive: list[Tensor] = []

    def hold(tensor: Tensor) -> Tensor:
        alive.append(tensor)
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    x = hold(inputs)
    with torch.autograd.graph.saved_tensors_hooks(hold, lambda tensor: tensor):
        for spec, layer in zip(specs, layers, strict=True):
            forward_fn = spec.forward_fn if isinstance(spec, TiedLayerSpec) else None
            x = forward_fn(layer, x) if forward_fn else layer(x)
        hold(x if labels is None else language_model_loss(x, labels))
    for layer in layers:
        for parameter in layer.parameters():
            storages.pop(parameter.untyped_storage().data_ptr(), None)
    return sum(storages.values())


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_a_convolution_has_equal_operations_in_its_three_parts(groups: int) -> None:
    """Each number of the output is a sum over the channels of its group and the kernel, by hand."""
    specs = [LayerSpec(nn.Conv1d, 4, 8, 3, groups=groups)]
    inputs = torch.empty(2, 4, 9, requires_grad=True, device="meta")
    (costs,) = describe_layers(specs, inputs, dtype=torch.float32).layers
    by_hand = 2 * (2 * 8 * 7) * (4 // groups) * 3
    assert (costs.forward_flops, costs.input_gradient_flops, costs.weight_gradient_flops) == (by_hand,) * 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_stage_holds_what_a_real_one_holds(dtype: torch.dtype) -> None:
    specs = gpt(num_layers=3, hidden_size=128, num_heads=4, max_positions=64)
    ids = torch.zeros(2, 64, dtype=torch.int64)
    costs = describe_layers(specs, ids, dtype=dtype, loss_fn=language_model_loss, labels=ids)
    x = torch.randn(2, 64, 128, dtype=dtype)
    stages = {
        "first": (range(4), ids, None),
        "middle": (range(4, 7), x.requires_grad_(), None),
        "last": (range(6, len(specs)), x, ids),
    }
    assert costs.loss is not None
    for name, (stage, inputs, labels) in stages.items():
        layers = [costs.layers[idx] for idx in stage] + ([] if labels is None else [costs.loss])
        expected = bytes_kept([specs[idx] for idx in stage], inputs, dtype=dtype, labels=labels)
        assert stage_activation_bytes(layers) == pytest.approx(expected, rel=0.01), name


def test_what_one_layer_keeps_can_be_told_by_hand() -> None:
    specs = [LayerSpec(nn.Linear, 4, 6), LayerSpec(nn.Tanh), LayerSpec(nn.GELU), LayerSpec(nn.Identity)]
    linear, tanh, gelu, identity = describe_layers(specs, torch.zeros(5, 4), dtype=torch.bfloat16).layers
    assert (linear.parameters, linear.forward_flops, linear.weight_gradient_flops) == (30, 240, 240)
    assert (linear.input_bytes, linear.output_bytes, linear.saved_bytes) == (40, 60, 0)
    kept = [(layer.keeps_input, layer.keeps_output) for layer in (linear, tanh, gelu, identity)]
    assert kept == [(True, False), (False, True), (True, False), (False, False)]
    assert stage_activation_bytes([linear, tanh, gelu, identity]) == 40 + 60 + 60


def test_dropout_keeps_its_mask_as_bool() -> None:
    specs = [LayerSpec(nn.Linear, 4, 8), LayerSpec(nn.Dropout, 0.1), LayerSpec(nn.Dropout, 0.0)]
    _, dropout, nothing = describe_layers(specs, torch.zeros(5, 4), dtype=torch.float32).layers
    assert dropout.saved_bytes == 5 * 8
    assert nothing.saved_bytes == 0


def test_attention_keeps_no_square_matrix_wherever_it_stands() -> None:
    specs = [
        LayerSpec(nn.Linear, 16, 16),
        LayerSpec(nn.TransformerEncoderLayer, 16, 2, 32, dropout=0.0, batch_first=True),
    ]
    short, long = (
        describe_layers(specs, torch.zeros(1, num_tokens, 16), dtype=torch.float32).layers[1]
        for num_tokens in (256, 512)
    )
    assert long.saved_bytes == 2 * short.saved_bytes
    assert long.forward_flops > 2 * short.forward_flops


class Grouped(nn.Module):
    """Attention with fewer heads of keys than of queries, and a mask."""

    def forward(self, x: Tensor) -> Tensor:
        q, k = x.view(2, 8, 4, 4).transpose(1, 2), x[..., :8].reshape(2, 8, 2, 4).transpose(1, 2)
        mask = torch.ones(8, 8, dtype=torch.bool)
        return F.scaled_dot_product_attention(q, k, k, attn_mask=mask, enable_gqa=True).transpose(1, 2).flatten(2)


def test_attention_may_have_a_mask_and_fewer_keys() -> None:
    costs = describe_layers([LayerSpec(nn.Linear, 16, 16), LayerSpec(Grouped)], torch.zeros(2, 8, 16), dtype=torch.half)
    assert costs.layers[1].forward_flops == 2 * 2 * (2 * 4 * 8 * 8 * 4)
    assert costs.layers[1].output_bytes == 2 * 8 * 16 * 2


class Pair(nn.Module):
    """Takes and returns `(x, mask)`, with the mask as it was, and on request token ids beside them."""

    def __init__(self, width: int, *, with_ids: bool = False) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)
        self.with_ids = with_ids

    def forward(self, inputs: tuple[Tensor, Tensor]) -> dict[str, Any] | tuple[Tensor, Tensor]:
        x, mask = inputs
        x = self.linear(x) * mask
        return {"x": x, "ids": x.argmax(-1), "nothing": None} if self.with_ids else (x, mask)


class Pick(nn.Module):
    def forward(self, inputs: dict[str, Any]) -> Tensor:
        picked: Tensor = inputs["x"].index_select(-1, inputs["ids"])
        return picked


def test_layers_may_pass_tuples_and_integers() -> None:
    specs = [LayerSpec(Pair, 32), LayerSpec(Pair, 32), LayerSpec(Pair, 32, with_ids=True), LayerSpec(Pick)]
    inputs = (torch.zeros(4, 32), torch.ones(4, 1, dtype=torch.bool))
    first, second, third, fourth = describe_layers(specs, inputs, dtype=torch.float32).layers
    assert first.output_bytes == second.input_bytes == 4 * 32 * 4 + 4
    assert (first.input_gradient_flops, second.input_gradient_flops) == (0, 2 * 4 * 32 * 32)
    assert second.keeps_input
    assert third.output_bytes == fourth.input_bytes == 4 * 32 * 4 + 4 * 8
    # The numbers alone are kept, a small part of what enters.
    assert not fourth.keeps_input
    assert fourth.saved_bytes == 4 * 8


class Discards(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        torch.exp(x * x).sum()
        return x.relu_()


def test_what_leads_to_no_result_is_not_kept_and_inputs_may_be_changed() -> None:
    costs = describe_layers([LayerSpec(nn.Linear, 4, 4), LayerSpec(Discards)], torch.zeros(2, 4), dtype=torch.float32)
    assert costs.layers[1].saved_bytes == 0


class Recomputes(nn.Module):
    """Checkpoints its own activations."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Sequential(nn.Linear(4, 16), nn.GELU(), nn.Linear(16, 4))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = checkpoint(self.block, x, use_reentrant=False)
        return x + y


def test_a_layer_that_checkpoints_itself_keeps_its_input_alone() -> None:
    specs = [LayerSpec(nn.Linear, 4, 4), LayerSpec(Recomputes)]
    costs = describe_layers(specs, torch.zeros(8, 4), dtype=torch.float32).layers[1]
    assert (costs.keeps_input, costs.saved_bytes) == (True, 0)
    # Its backward makes the forward again, up to the last product, of which nothing is needed.
    products = 2 * 8 * 4 * 16
    assert costs.forward_flops == costs.weight_gradient_flops == 2 * products
    assert costs.input_gradient_flops in (3 * products, 4 * products)


class Counted(nn.Module):
    built = 0

    def __init__(self, width: int) -> None:
        super().__init__()
        Counted.built += 1
        self.linear = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.linear(x)
        return y


def test_equal_layers_are_described_once() -> None:
    Counted.built = 0
    specs = [LayerSpec(Counted, 8, name=f"block {idx}") for idx in range(50)]
    costs = describe_layers(specs, torch.zeros(2, 8), dtype=torch.float32).layers
    # The first computes no gradient of its input.
    assert Counted.built == 2
    assert costs[0] != costs[1] == costs[49]


def test_a_tied_layer_is_applied_by_its_own_function() -> None:
    specs = gpt(num_layers=1, tied_embedding=True)
    costs = describe_layers(specs, token_ids(2, 8), dtype=torch.float32).layers
    width = GPT2Config(preset="tiny", vocab_size=512).hidden_size
    assert costs[0].parameters == costs[-1].parameters == 512 * width
    assert (costs[0].forward_flops, costs[-1].forward_flops) == (0, 2 * 2 * 8 * 512 * width)


def test_the_loss_may_be_a_module_with_tensors_of_its_own() -> None:
    loss_fn = nn.CrossEntropyLoss(weight=torch.ones(8))
    costs = describe_layers(
        [LayerSpec(nn.Linear, 4, 8)],
        torch.zeros(5, 4),
        dtype=torch.float32,
        loss_fn=loss_fn,
        labels=torch.zeros(5, dtype=torch.int64),
    )
    assert costs.loss is not None
    assert (costs.loss.parameters, costs.loss.output_bytes) == (0, 4)
    assert costs.loss.saved_bytes >= 5 * 8 * 4
    assert loss_fn.weight is not None
    assert loss_fn.weight.device.type == "cpu"


class NeedsValues(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * x.sum().item()


def test_a_layer_that_needs_values_is_named() -> None:
    specs = [LayerSpec(nn.Linear, 4, 4), LayerSpec(NeedsValues, name="scale")]
    with pytest.raises(ConfigError, match=r"layer 'scale' \(NeedsValues\).*partition=profile"):
        describe_layers(specs, torch.zeros(2, 4), dtype=torch.float32)


def test_a_layer_that_does_not_fit_is_named_with_its_input() -> None:
    specs = [LayerSpec(nn.Linear, 4, 4), LayerSpec(nn.Linear, 5, 4)]
    with pytest.raises(ConfigError, match=r"'layers\.1' \(Linear\) .* float32\[2, 4\]: RuntimeError"):
        describe_layers(specs, torch.zeros(2, 4), dtype=torch.float32)


def test_a_loss_that_does_not_fit_is_named() -> None:
    with pytest.raises(ConfigError, match="loss function mse_loss"):
        describe_layers(
            [LayerSpec(nn.Linear, 4, 4)], torch.zeros(2, 4), dtype=torch.half, loss_fn=F.mse_loss, labels=torch.ones(3)
        )


def test_a_sequence_that_is_too_long_keeps_its_own_error() -> None:
    with pytest.raises(ConfigError, match="max_positions=8"):
        describe_layers(gpt(max_positions=8), token_ids(1, 9), dtype=torch.float32)


def test_a_trillion_parameters_are_described_without_torchs_compiler() -> None:
    code = """
import sys, torch
from pipekit.models.gpt2 import GPT2Config
from pipekit.models.transformer import language_model_loss
from pipekit.costs.describe import describe_layers
specs = GPT2Config(preset="gpt2", vocab_size=51200, num_layers=128, hidden_size=25600, num_heads=160,
                             max_positions=2048, dropout=0.1, tied_embedding=False).layer_specs()
ids = torch.empty(1, 2048, dtype=torch.int64, device="meta")
costs = describe_layers(specs, ids, dtype=torch.bfloat16, loss_fn=language_model_loss, labels=ids)
assert sum(layer.parameters for layer in costs.layers) > 1e12
assert not {"sympy", "torch._dynamo"} & sys.modules.keys()
"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=120)


def test_a_loss_that_computes_the_scores_itself_is_part_of_the_head() -> None:
    # 2 x 16 tokens of 67 words, through the head in chunks of 5.
    model = GPT2Config(vocab_size=67, hidden_size=32, num_layers=1, num_heads=4, max_positions=16)
    specs, chunked = model.layer_specs(), model.layer_specs(loss_chunk_tokens=5)
    tokens = torch.empty(2, 16, dtype=torch.int64, device="meta")
    plain, fused = (
        describe_layers(each, tokens, dtype=torch.float32, loss_fn=language_model_loss, labels=tokens)
        for each in (specs, chunked)
    )
    assert plain.loss is not None
    assert fused.loss is None
    head, other = fused.layers[-1], plain.layers[-1]
    assert head.parameters == other.parameters
    assert head.forward_flops == other.forward_flops == 2 * 32 * 67 * 32
    # The backward computes the scores again.
    assert head.flops == other.flops + other.forward_flops
    # The scores are held neither by the head nor by the loss.
    assert head.saved_bytes + head.output_bytes < 2 * 16 * 67 * 4 < other.output_bytes + plain.loss.saved_bytes
