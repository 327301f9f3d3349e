"""A layer that was built whole keeps a rank's part."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from pipekit.errors import LayoutError
from pipekit.layers.specs import LayerSpec, build_layer
from pipekit.tensor_parallel import (
    ColumnParallelLinear,
    KeyValueLinear,
    PlannedGroup,
    RowParallelLinear,
    TensorParallelModule,
    has_partial_gradient,
    shard_layer,
    shard_of,
)
from tensor_parallel.sharded_model import join_parameters


class Block(nn.Module):
    """A user's own layer, with initial weights of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(6)
        self.expand = ColumnParallelLinear(6, 10)
        self.keys = KeyValueLinear(6, 1, 2)
        self.contract = RowParallelLinear(10, 6)
        nn.init.orthogonal_(self.expand.weight)
        nn.init.trunc_normal_(self.contract.weight, std=0.02)
        nn.init.normal_(self.contract.bias)


def cut(size: int, sequence_parallel: bool = False) -> list[nn.Module]:
    layers = []
    for rank in range(size):
        layer = build_layer(LayerSpec(Block), name="block", seed=3)
        shard_layer(layer, PlannedGroup(rank, size), sequence_parallel=sequence_parallel)
        layers.append(layer)
    return layers


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_initial_weights_do_not_depend_on_the_ranks(size: int) -> None:
    whole = build_layer(LayerSpec(Block), name="block", seed=3)
    joined = join_parameters([dict(layer.named_parameters()) for layer in cut(size)])
    assert joined.keys() == dict(whole.named_parameters()).keys()
    for name, parameter in whole.named_parameters():
        assert torch.equal(joined[name], parameter), name
    columns = joined["expand.weight"]
    torch.testing.assert_close(columns.T @ columns, torch.eye(6))


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_every_parameter_says_what_a_rank_has_of_it(sequence_parallel: bool) -> None:
    for rank, layer in enumerate(cut(2, sequence_parallel)):
        parameters = dict(layer.named_parameters())
        shards = {name: shard_of(parameter) for name, parameter in parameters.items()}
        assert {name for name, shard in shards.items() if shard is not None} == {
            "expand.weight",
            "expand.bias",
            "contract.weight",
        }
        assert all(shard.rank == rank and shard.size == 2 for shard in shards.values() if shard is not None)
        partial = {name for name, parameter in parameters.items() if has_partial_gradient(parameter)}
        # Of the one head of keys and values, two ranks' queries each give a part of the gradient.
        keys = {"keys.weight", "keys.bias"}
        assert partial == (keys | {"norm.weight", "norm.bias", "contract.bias"} if sequence_parallel else keys)


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_every_module_in_a_layer_is_sharded_once(sequence_parallel: bool) -> None:
    calls: list[str] = []

    class Counting(TensorParallelModule):
        def __init__(self, name: str, *inside: nn.Module) -> None:
            super().__init__()
            self.name = name
            self.inside = nn.ModuleList(inside)

        def shard(self, group: PlannedGroup, *, sequence_parallel: bool) -> None:  # type: ignore[override]
            super().shard(group, sequence_parallel=sequence_parallel)
            calls.append(self.name)

    deepest = Counting("deepest")
    layer = nn.Sequential(Counting("outer", Counting("inner", deepest), deepest))
    group = PlannedGroup(1, 2)
    shard_layer(layer, group, sequence_parallel=sequence_parallel)
    assert sorted(calls) == ["deepest", "inner", "outer"]
    assert deepest.group is group
    assert deepest.sequence_parallel is sequence_parallel


def test_a_layer_that_knows_nothing_of_it_stays_whole() -> None:
    layer = nn.MultiheadAttention(4, 2)
    before = {name: parameter.clone() for name, parameter in layer.named_parameters()}
    shard_layer(layer, PlannedGroup(1, 2), sequence_parallel=False)
    for name, parameter in layer.named_parameters():
        assert torch.equal(parameter, before[name])
        assert shard_of(parameter) is None
        assert not has_partial_gradient(parameter)
        assert not hasattr(parameter, "tensor_model_parallel")


def test_a_part_holds_no_memory_of_the_whole() -> None:
    def held_bytes(tensor: Tensor) -> int:
        return tensor.untyped_storage().nbytes()

    (layer, _) = cut(2)
    for name, parameter in layer.named_parameters():
        assert held_bytes(parameter) == parameter.numel() * 4, name


class Shared(nn.Module):
    """Two modules of one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.queries, self.keys = ColumnParallelLinear(4, 6, bias=False), ColumnParallelLinear(4, 6, bias=False)
        self.keys.weight = self.queries.weight


def test_a_weight_that_two_modules_share_stays_one() -> None:
    layer = Shared()
    shard_layer(layer, PlannedGroup(1, 2), sequence_parallel=False)
    assert layer.queries.weight.shape == (3, 4)
    assert layer.keys.weight is layer.queries.weight


class Half(nn.Module):
    """Shares what is cut with a module that is not."""

    def __init__(self) -> None:
        super().__init__()
        self.column = ColumnParallelLinear(8, 8, bias=False)
        self.plain = nn.Linear(8, 8, bias=False)
        self.plain.weight = self.column.weight


class Crossed(nn.Module):
    """Shares a weight that one module cuts by rows and the other by columns."""

    def __init__(self) -> None:
        super().__init__()
        self.column = ColumnParallelLinear(8, 8, bias=False)
        self.row = RowParallelLinear(8, 8, bias=False)
        self.row.weight = self.column.weight


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (Half, r"Half.plain.weight is shared with a module that parallel.tp=2 shards, and is not sharded itself"),
        (
            Crossed,
            r"RowParallelLinear.weight is shared with a module that shards it in another way under parallel.tp=2",
        ),
    ],
)
def test_a_weight_is_not_untied_silently(layer: type[nn.Module], message: str) -> None:
    with pytest.raises(LayoutError, match=message):
        shard_layer(layer(), PlannedGroup(rank=0, size=2), sequence_parallel=False)
