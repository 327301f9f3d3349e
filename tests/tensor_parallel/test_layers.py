"""Layers that ranks share out, against torch's own in one process."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pipekit.errors import ConfigError, DataError, LayoutError
from pipekit.tensor_parallel import (
    ColumnParallelLinear,
    KeyValueLinear,
    PlannedGroup,
    RowParallelLinear,
    Shard,
    TensorGroup,
    TensorParallelModule,
    VocabularyParallelEmbedding,
    column_parallel_linears,
    copy_to_shards,
    gather_sequence_for_shards,
    shard_layer,
    shard_of,
    shard_parameter,
)
from pipekit.tensors.weight_gradients import Compute, add_gradient, deferring
from tensor_parallel.networks import (
    IN,
    OUT,
    B,
    Network,
    Outcome,
    Plain,
    S,
    assert_same,
    drawn,
    fill,
    inputs,
    output_gradient,
    own_part,
    run_plain,
    run_sharded,
    together,
)
from tensor_parallel.sharded_model import assert_all_close, join_gradients, join_parameters
from tensor_parallel.threads import run_ranks

DEGREES = [1, 2, 3, 4]
both_flows = pytest.mark.parametrize("sequence_parallel", [False, True], ids=["whole", "in parts"])


# Column and row


@both_flows
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("size", DEGREES)
def test_column_and_row_compute_what_torch_does(size: int, bias: bool, sequence_parallel: bool) -> None:
    expected = run_plain(Plain(bias=bias), inputs())
    actual = run_sharded(size, sequence_parallel, partial(Network, bias=bias), inputs())
    assert_same(actual, expected)


def test_without_a_group_they_are_torchs_layers() -> None:
    assert_same(run_plain(Network(), inputs()), run_plain(Plain(), inputs()), tolerance=0)


def test_inputs_need_not_have_three_dimensions() -> None:
    x = drawn(7, IN, seed=3).requires_grad_()
    expected = Plain()(x)
    expected.sum().backward()

    def run(group: TensorGroup) -> tuple[Tensor, Tensor | None]:
        module, own = Network(), x.detach().clone().requires_grad_()
        shard_layer(module, group, sequence_parallel=False)
        y = module(own)
        y.sum().backward()
        return y.detach(), own.grad

    for y, gradient in run_ranks(2, run):
        torch.testing.assert_close(y, expected.detach())
        torch.testing.assert_close(gradient, x.grad)


@both_flows
def test_inputs_that_need_no_gradient(sequence_parallel: bool) -> None:
    expected = run_plain(Plain(), inputs(requires_grad=False))
    assert_same(run_sharded(2, sequence_parallel, Network, inputs(requires_grad=False)), expected)


@both_flows
@pytest.mark.parametrize("frozen", ["column.weight", "column.bias", "row.weight", "row.bias", "column", "all"])
def test_frozen_weights_get_no_gradient(frozen: str, sequence_parallel: bool) -> None:
    def freeze(module: nn.Module) -> nn.Module:
        for name, parameter in module.named_parameters():
            parameter.requires_grad_(not (frozen == "all" or name.startswith(frozen)))
        return module

    expected = run_plain(freeze(Plain()), inputs())
    assert_same(run_sharded(3, sequence_parallel, lambda: freeze(Network()), inputs()), expected)


@both_flows
def test_a_weight_that_is_used_twice_sums_its_gradients(sequence_parallel: bool) -> None:
    def twice(module: nn.Module, x: Tensor) -> Tensor:
        return module(x) + module(2 * x)  # type: ignore[no-any-return]

    plain, x = Plain(), inputs()
    y = twice(plain, x)
    y.backward(output_gradient())  # type: ignore[no-untyped-call]
    gradients = {name: p.grad for name, p in plain.named_parameters() if p.grad is not None}
    assert_same(run_sharded(2, sequence_parallel, Network, inputs(), twice), Outcome(y.detach(), x.grad, gradients))


@both_flows
def test_under_autocast_they_are_as_torchs_layers_are(sequence_parallel: bool) -> None:
    def automatic(module: nn.Module, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return module(x)  # type: ignore[no-any-return]

    plain, x = Plain(dtype=torch.float32), inputs(dtype=torch.float32)
    y = automatic(plain, x)
    y.backward(output_gradient(y.dtype))  # type: ignore[no-untyped-call]
    gradients = {name: p.grad for name, p in plain.named_parameters() if p.grad is not None}
    expected = Outcome(y.detach(), x.grad, gradients)
    actual = run_sharded(
        2, sequence_parallel, partial(Network, dtype=torch.float32), inputs(dtype=torch.float32), automatic
    )
    assert actual.gradients["column.weight"].dtype == torch.float32
    # bf16 has 8 bits; the products are of some ten terms of size one.
    for name, gradient in expected.gradients.items():
        error = (actual.gradients[name] - gradient).norm() / gradient.norm()
        assert error < 2e-2, name
    assert (actual.output.float() - y.float()).norm() / y.float().norm() < 2e-2
    assert actual.input_gradient is not None
    assert x.grad is not None
    assert (actual.input_gradient - x.grad).norm() / x.grad.norm() < 2e-2


@both_flows
def test_under_autocast_the_type_of_the_output_is_that_of_torchs_layers(sequence_parallel: bool) -> None:
    def output_type(group: TensorGroup | None, kind: type[nn.Linear]) -> torch.dtype:
        layer = kind(IN, OUT)
        if group is not None:
            shard_layer(layer, group, sequence_parallel=sequence_parallel)
        x = torch.ones(B, S, layer.weight.shape[1])
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return layer(x).dtype  # type: ignore[no-any-return]

    for kind in (ColumnParallelLinear, RowParallelLinear):
        assert output_type(PlannedGroup(0, 2), kind) == output_type(None, nn.Linear), kind.__name__


@both_flows
def test_activation_checkpointing_recomputes_the_same(sequence_parallel: bool) -> None:
    def recomputed(module: nn.Module, x: Tensor) -> Tensor:
        # The generator is the process's, and ranks here are threads of it.
        return checkpoint(module, x, use_reentrant=False, preserve_rng_state=False)  # type: ignore[no-any-return]

    assert_same(run_sharded(2, sequence_parallel, Network, inputs(), recomputed), run_plain(Plain(), inputs()))


@pytest.mark.parametrize("checkpointed", [False, True], ids=["kept", "recomputed"])
@both_flows
def test_weight_gradients_that_are_put_off_are_the_same(sequence_parallel: bool, checkpointed: bool) -> None:
    x, expected = inputs(), run_plain(Plain(), inputs())

    def run(group: TensorGroup) -> dict[str, nn.Parameter]:
        module = Network()
        shard_layer(module, group, sequence_parallel=sequence_parallel)
        own = own_part(x.detach(), group, sequence_parallel).clone().requires_grad_()
        y = checkpoint(module, own, use_reentrant=False, preserve_rng_state=False) if checkpointed else module(own)
        y.backward(own_part(output_gradient(), group, sequence_parallel))
        assert own.grad is not None
        return dict(module.named_parameters())

    pieces: list[tuple[Tensor, Compute]] = []
    with deferring() as later:  # of all ranks, which are threads
        ranks = run_ranks(2, run)
    later.compute(lambda weight, compute: pieces.append((weight, compute)))
    for rank in ranks:
        assert rank["column.weight"].grad is None
        assert rank["column.bias"].grad is None
        own = {id(rank[name]) for name in ("column.weight", "column.bias")}
        assert len([weight for weight, _ in pieces if id(weight) in own]) == 2

    def catch_up(group: TensorGroup) -> None:
        own = {id(parameter) for parameter in ranks[group.rank].values()}
        for weight, compute in pieces:
            if id(weight) in own:
                add_gradient(weight, compute)

    run_ranks(2, catch_up)
    assert_all_close(join_gradients(ranks), expected.gradients)


def test_blocks_that_are_not_the_outputs_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"blocks=\[4, 3\] are 7 outputs in all, and out_features=8"):
        ColumnParallelLinear(2, 8, blocks=(4, 3))


# Several layers of one input


@both_flows
@pytest.mark.parametrize("size", DEGREES)
def test_several_layers_of_one_input(size: int, sequence_parallel: bool) -> None:
    widths, has_bias = (8, 5, 7), (True, False, True)
    whole = [nn.Linear(IN, width, bias, dtype=torch.float64) for width, bias in zip(widths, has_bias, strict=True)]
    x = inputs()
    outputs = [linear(x) for linear in whole]
    gradients = [drawn(B, S, width, seed=10 + width) for width in widths]
    torch.autograd.backward(outputs, gradients)

    def run(group: TensorGroup) -> tuple[list[Tensor], Tensor | None, dict[str, nn.Parameter]]:
        shards = [Shard(0, (width,), group.rank, size) for width in widths]
        layers = nn.ModuleList()
        for linear in whole:
            layer = ColumnParallelLinear(IN, linear.out_features, linear.bias is not None, dtype=torch.float64)
            layer.load_state_dict(linear.state_dict())
            layers.append(layer)
        shard_layer(layers, group, sequence_parallel=sequence_parallel)
        own = own_part(x.detach(), group, sequence_parallel).clone().requires_grad_()
        pairs = [(layer.weight, layer.bias) for layer in layers]
        ys = column_parallel_linears(own, pairs, group, sequence_parallel=sequence_parallel)
        torch.autograd.backward(
            ys,
            [
                Shard(2, shard.blocks, shard.rank, size).take(each)
                for shard, each in zip(shards, gradients, strict=True)
            ],
        )
        return [y.detach() for y in ys], own.grad, dict(layers.named_parameters())

    parts, input_gradients, parameters = zip(*run_ranks(size, run), strict=True)
    for each, output in zip(zip(*parts, strict=True), outputs, strict=True):
        torch.testing.assert_close(torch.cat(each, 2), output.detach())
    torch.testing.assert_close(together(input_gradients, sequence_parallel), x.grad)
    expected = {
        f"{index}.{name}": p.grad for index, linear in enumerate(whole) for name, p in linear.named_parameters()
    }
    assert_all_close(join_gradients(parameters), expected)  # type: ignore[arg-type]


@both_flows
def test_an_output_that_is_not_used_changes_nothing(sequence_parallel: bool) -> None:
    x, weights = inputs(), [drawn(4, IN, seed=20), drawn(6, IN, seed=21)]
    F.linear(x, weights[0]).sum().backward()

    def run(group: TensorGroup) -> Tensor | None:
        own = own_part(x.detach(), group, sequence_parallel).clone().requires_grad_()
        pairs = [(Shard(0, (len(weight),), group.rank, 2).take(weight), None) for weight in weights]
        column_parallel_linears(own, pairs, group, sequence_parallel=sequence_parallel)[0].sum().backward()
        return own.grad

    torch.testing.assert_close(together(run_ranks(2, run), sequence_parallel), x.grad)  # type: ignore[arg-type]


def test_several_layers_without_a_group() -> None:
    x, weight, bias = inputs(), drawn(4, IN, seed=20), drawn(4, seed=21)
    first, second = column_parallel_linears(x, [(weight, bias), (weight, None)], None)
    assert torch.equal(first, F.linear(x, weight, bias))
    assert torch.equal(second, F.linear(x, weight))


@both_flows
@pytest.mark.parametrize("size", [2, 3])
def test_of_every_block_a_rank_computes_some(size: int, sequence_parallel: bool) -> None:
    blocks = (6, 4, 5)
    linear, x = nn.Linear(IN, 15, dtype=torch.float64), inputs()
    expected = linear(x)
    gradient = drawn(B, S, 15, seed=4)
    expected.backward(gradient)

    def run(group: TensorGroup) -> tuple[Tensor, Tensor | None, dict[str, nn.Parameter]]:
        layer = ColumnParallelLinear(IN, 15, blocks=blocks, dtype=torch.float64)
        layer.load_state_dict(linear.state_dict())
        shard_layer(layer, group, sequence_parallel=sequence_parallel)
        own = own_part(x.detach(), group, sequence_parallel).clone().requires_grad_()
        y = layer(own)
        y.backward(Shard(2, blocks, group.rank, size).take(gradient))
        return y.detach(), own.grad, dict(layer.named_parameters())

    outputs, input_gradients, parameters = zip(*run_ranks(size, run), strict=True)
    starts = (0, 6, 10)
    for rank, output in enumerate(outputs):
        thirds = [expected[..., start : start + length] for start, length in zip(starts, blocks, strict=True)]
        wanted = torch.cat([third.tensor_split(uneven(third.shape[-1], size), -1)[rank] for third in thirds], -1)
        torch.testing.assert_close(output, wanted.detach())
    torch.testing.assert_close(together(input_gradients, sequence_parallel), x.grad)
    assert_all_close(join_gradients(parameters), {"weight": linear.weight.grad, "bias": linear.bias.grad})  # type: ignore[dict-item]


def uneven(length: int, size: int) -> list[int]:
    """Return where parts of a length begin, the larger first."""
    return [sum(length // size + (other < length % size) for other in range(rank)) for rank in range(1, size)]


# Keys and values


@both_flows
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize(("size", "num_kv_heads"), [(1, 3), (2, 4), (2, 2), (2, 1), (4, 2), (3, 1), (4, 4)])
def test_keys_and_values_of_a_ranks_heads(size: int, num_kv_heads: int, bias: bool, sequence_parallel: bool) -> None:
    head_size, width = 3, num_kv_heads * 3
    linear, x = nn.Linear(IN, 2 * width, bias, dtype=torch.float64), inputs()

    def heads_of(rank: int) -> range:
        """As many heads for each rank as there are; one that several share, where there are fewer heads than ranks."""
        if num_kv_heads >= size:
            each = num_kv_heads // size
            return range(rank * each, (rank + 1) * each)
        return range(rank // (size // num_kv_heads), rank // (size // num_kv_heads) + 1)

    def own_outputs(rank: int, whole: Tensor) -> Tensor:
        keys_and_values = whole.unflatten(-1, (2, num_kv_heads, head_size))
        return keys_and_values[..., list(heads_of(rank)), :].flatten(-3)

    expected = linear(x)
    own = [own_outputs(rank, expected) for rank in range(size)]
    gradients = [drawn(*each.shape, seed=30 + rank) for rank, each in enumerate(own)]
    torch.autograd.backward(own, gradients)

    def run(group: TensorGroup) -> tuple[Tensor, Tensor | None, dict[str, nn.Parameter]]:
        layer = KeyValueLinear(IN, num_kv_heads, head_size, bias=bias).double()
        layer.load_state_dict(linear.state_dict())
        shard_layer(layer, group, sequence_parallel=sequence_parallel)
        part = own_part(x.detach(), group, sequence_parallel).clone().requires_grad_()
        y = layer(part)
        y.backward(gradients[group.rank])
        return y.detach(), part.grad, dict(layer.named_parameters())

    outputs, input_gradients, parameters = zip(*run_ranks(size, run), strict=True)
    for output, wanted in zip(outputs, own, strict=True):
        torch.testing.assert_close(output, wanted.detach())
    torch.testing.assert_close(together(input_gradients, sequence_parallel), x.grad)
    assert_all_close(
        join_gradients(parameters),
        {name: parameter.grad for name, parameter in linear.named_parameters() if parameter.grad is not None},
    )
    is_cut = num_kv_heads % size == 0
    assert all((shard_of(parameter) is not None) == is_cut for parameter in parameters[0].values())


@pytest.mark.parametrize(("size", "num_kv_heads", "instead"), [(2, 3, 1), (6, 4, 2), (4, 6, 2)])
def test_heads_of_keys_and_values_that_do_not_go_into_the_ranks(size: int, num_kv_heads: int, instead: int) -> None:
    layer = KeyValueLinear(4, num_kv_heads, 2)
    with pytest.raises(
        LayoutError,
        match=rf"parallel\.tp={size} and {num_kv_heads} key-value heads .*; try parallel\.tp={instead}$",
    ):
        shard_layer(layer, PlannedGroup(0, size), sequence_parallel=False)


# Embedding


@both_flows
@pytest.mark.parametrize("size", DEGREES)
@pytest.mark.parametrize("vocab_size", [4, 12, 13, 23])
def test_tokens_are_looked_up_on_the_rank_that_has_them(vocab_size: int, size: int, sequence_parallel: bool) -> None:
    borders = sorted(
        {
            index
            for rank in range(size)
            for part in Shard(0, (vocab_size,), rank, size).slices
            for index in (part.start, part.stop - 1)
        }
    )
    filled = (borders * 24)[:24] if vocab_size > 4 else [0, 3] * 12
    token_ids = torch.tensor(filled).reshape(B, S)
    weight, gradient = drawn(vocab_size, OUT, seed=5).requires_grad_(), output_gradient()
    expected = F.embedding(token_ids, weight)
    expected.backward(gradient)  # type: ignore[no-untyped-call]

    def run(group: TensorGroup) -> tuple[Tensor, dict[str, nn.Parameter]]:
        layer = VocabularyParallelEmbedding(vocab_size, OUT).double()
        layer.load_state_dict({"weight": weight.detach()})
        shard_layer(layer, group, sequence_parallel=sequence_parallel)
        y = layer(token_ids)
        y.backward(own_part(gradient, group, sequence_parallel))
        return y.detach(), dict(layer.named_parameters())

    outputs, parameters = zip(*run_ranks(size, run), strict=True)
    torch.testing.assert_close(together(outputs, sequence_parallel), expected.detach())
    assert_all_close(join_gradients(parameters), {"weight": weight.grad})  # type: ignore[dict-item]
    assert_all_close(join_parameters(parameters), {"weight": weight.detach()}, tolerance=0)


def test_an_embedding_draws_its_weights_as_it_is_told() -> None:
    layer = VocabularyParallelEmbedding(400, 50, init_std=0.3)
    assert float(layer.weight.detach().std()) == pytest.approx(0.3, rel=0.05)
    assert torch.equal(layer(torch.tensor([[3, 399]])), layer.weight[[3, 399]][None])


@pytest.mark.parametrize(
    ("build", "least"),
    [
        (lambda: ColumnParallelLinear(4, 2), 2),
        (lambda: ColumnParallelLinear(4, 8, blocks=(5, 3)), 3),
        (lambda: RowParallelLinear(3, 8), 3),
        (lambda: VocabularyParallelEmbedding(2, 8), 2),
    ],
    ids=["column", "block", "row", "embedding"],
)
def test_a_layer_too_small_for_so_many_ranks_is_refused(build: Callable[[], nn.Module], least: int) -> None:
    with pytest.raises(LayoutError, match=rf"parallel\.tp=4 is more than .* {least}; try parallel\.tp={least}"):
        shard_layer(build(), PlannedGroup(0, 4), sequence_parallel=False)


# Shapes alone


@both_flows
@pytest.mark.parametrize("rank", range(3))
def test_planned_layers_have_the_real_shapes(rank: int, sequence_parallel: bool) -> None:
    def shapes(group: TensorGroup, device: str) -> list[tuple[int, ...]]:
        embedding = VocabularyParallelEmbedding(13, IN)
        network = nn.Sequential(embedding, Network(), KeyValueLinear(OUT, 3, 2)).to(device, torch.float64)
        shard_layer(network, group, sequence_parallel=sequence_parallel)
        y = network(torch.zeros(B, S, dtype=torch.int64, device=device))
        y.sum().backward()
        gradients = [parameter.grad for parameter in network.parameters()]
        return [tuple(y.shape), *(tuple(each.shape) for each in gradients if each is not None)]

    planned = shapes(PlannedGroup(rank, 3), "meta")
    assert planned == run_ranks(3, lambda group: shapes(group, "cpu"))[rank]


# A user's own


class Gate(TensorParallelModule):
    """Scales each feature, of which a rank has some."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(drawn(IN, seed=40))

    def shard(self, group: TensorGroup, *, sequence_parallel: bool) -> None:
        super().shard(group, sequence_parallel=sequence_parallel)
        shard_parameter(self, "scale", Shard(0, (IN,), group.rank, group.size))

    def forward(self, x: Tensor) -> Tensor:
        x = gather_sequence_for_shards(x, self.group) if self.sequence_parallel else copy_to_shards(x, self.group)
        shard = shard_of(self.scale)
        return (x if shard is None else x[..., shard.slices[0]]) * self.scale


class GatedNetwork(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.row = Gate(), RowParallelLinear(IN, OUT)
        fill(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.row(self.gate(x))  # type: ignore[no-any-return]


@both_flows
@pytest.mark.parametrize("size", [2, 3])
def test_a_users_own_module_is_shared_out_as_it_says(size: int, sequence_parallel: bool) -> None:
    expected = run_plain(GatedNetwork(), inputs())
    assert_same(run_sharded(size, sequence_parallel, GatedNetwork, inputs()), expected)


@pytest.mark.parametrize("token_ids", [[0, 7], [-1, 3]])
def test_an_id_that_is_no_token_is_refused(token_ids: list[int]) -> None:
    embedding = VocabularyParallelEmbedding(7, 4)
    shard_layer(embedding, PlannedGroup(rank=0, size=2), sequence_parallel=False)
    with pytest.raises(DataError, match="the embedding has 7 rows"):
        embedding(torch.tensor([token_ids]))
