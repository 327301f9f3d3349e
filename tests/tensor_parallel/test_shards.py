"""A rank's part of a logical tensor."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from pipekit.errors import LayoutError
from pipekit.tensor_parallel import Shard, has_partial_gradient, shard_of, shard_parameter
from pipekit.tensor_parallel.shards import mark_partial_gradient, shard_bounds


@st.composite
def cuts(draw: st.DrawFn) -> tuple[list[int], int, tuple[int, ...], int]:
    """Draw a shape, the dimension that is cut, the blocks along it, and the number of ranks."""
    size = draw(st.integers(1, 5))
    blocks = tuple(draw(st.lists(st.integers(size, 12), min_size=1, max_size=3)))
    dim = draw(st.integers(0, 2))
    shape = [draw(st.integers(1, 3)) for _ in range(3)]
    shape[dim] = sum(blocks)
    return shape, dim, blocks, size


@given(st.integers(0, 100), st.integers(1, 12))
def test_parts_are_as_even_as_can_be_and_follow_one_another(length: int, size: int) -> None:
    parts = [shard_bounds(length, rank, size) for rank in range(size)]
    assert [index for first, last in parts for index in range(first, last)] == list(range(length))
    lengths = [last - first for first, last in parts]
    assert max(lengths) - min(lengths) <= 1


@given(st.integers(0, 100), st.integers(1, 12))
def test_the_larger_parts_come_first(length: int, size: int) -> None:
    lengths = [last - first for first, last in (shard_bounds(length, rank, size) for rank in range(size))]
    assert lengths == sorted(lengths, reverse=True)


@given(cuts())
def test_a_rank_has_some_of_every_block_and_all_have_everything_once(
    cut: tuple[list[int], int, tuple[int, ...], int],
) -> None:
    shape, dim, blocks, size = cut
    # Along the dimension that is cut, an element's value is its index in its block, and the block's number.
    indices = torch.cat([torch.arange(length) for length in blocks])
    numbers = torch.cat([torch.full((length,), number) for number, length in enumerate(blocks)])
    whole = (numbers * 100 + indices).reshape([-1 if each == dim else 1 for each in range(3)]).expand(shape)
    seen: list[int] = []
    for rank in range(size):
        shard = Shard(dim, blocks, rank, size)
        part = shard.take(whole)
        line = part.movedim(dim, -1)[0, 0].tolist()
        expected = [
            number * 100 + index
            for number, length in enumerate(blocks)
            for index in range(length)
            if shard_bounds(length, rank, size)[0] <= index < shard_bounds(length, rank, size)[1]
        ]
        assert line == expected
        positions = [index for each in shard.slices for index in range(each.start, each.stop)]
        assert [whole.movedim(dim, -1)[0, 0][position].item() for position in positions] == line
        assert part.is_contiguous()
        assert tuple(part.shape) == shard.shape_of(rank, shape)
        assert shard.whole_shape(part.shape) == tuple(shape)
        seen += positions
    assert sorted(seen) == list(range(sum(blocks)))


@given(cuts())
def test_parts_that_are_joined_are_the_whole(cut: tuple[list[int], int, tuple[int, ...], int]) -> None:
    shape, dim, blocks, size = cut
    whole = torch.randn(shape, dtype=torch.float64)
    shards = [Shard(dim, blocks, rank, size) for rank in range(size)]
    parts = [shard.take(whole) for shard in shards]
    for shard in shards:
        assert torch.equal(shard.join(parts), whole)
        for rank in range(size):
            assert shard.shape_of(rank, parts[shard.rank].shape) == tuple(parts[rank].shape)


@pytest.mark.parametrize("blocks", [(6,), (3, 3)])
def test_a_part_is_a_tensor_of_its_own(blocks: tuple[int, ...]) -> None:
    whole = torch.zeros(6, 2)
    part = Shard(0, blocks, 0, 3).take(whole)
    part += 1
    assert whole.count_nonzero() == 0
    assert part.untyped_storage().nbytes() == part.numel() * part.element_size(), "it holds the whole alive"


def test_a_sharded_parameter_knows_its_shard() -> None:
    linear = nn.Linear(4, 6, dtype=torch.float64)
    whole = linear.weight.detach().clone()
    shard = Shard(0, (4, 2), 1, 2)
    assert shard_of(linear.weight) is None
    shard_parameter(linear, "weight", shard)
    assert isinstance(linear.weight, nn.Parameter)
    assert torch.equal(linear.weight.detach(), whole[[2, 3, 5]])
    assert shard_of(linear.weight) == shard
    # What DeepSpeed's gradient norm reads.
    assert linear.weight.tensor_model_parallel is True
    assert linear.weight.model_parallel is True
    assert linear.weight.is_leaf
    assert linear.weight.requires_grad
    assert shard_of(linear.bias) is None
    assert not hasattr(linear.bias, "tensor_model_parallel")
    assert list(dict(linear.named_parameters())) == ["weight", "bias"], "checkpoints keep the order of parameters"


def test_a_frozen_parameter_stays_frozen() -> None:
    linear = nn.Linear(4, 6)
    linear.weight.requires_grad_(False)
    shard_parameter(linear, "weight", Shard(0, (6,), 0, 2))
    assert not linear.weight.requires_grad


def test_marks_stay_when_a_layer_gets_another_type() -> None:
    linear = nn.Linear(4, 6)
    shard_parameter(linear, "weight", Shard(0, (6,), 0, 2))
    mark_partial_gradient(linear.bias)
    linear.to(torch.bfloat16)
    assert shard_of(linear.weight) == Shard(0, (6,), 0, 2)
    assert has_partial_gradient(linear.bias)


@pytest.mark.parametrize(("blocks", "least"), [((3,), 3), ((5, 2), 2)])
def test_a_parameter_that_leaves_a_rank_with_nothing_is_refused(blocks: tuple[int, ...], least: int) -> None:
    linear = nn.Linear(4, sum(blocks))
    with pytest.raises(LayoutError, match=rf"parallel\.tp=4 .*Linear\.weight .*, {least}; try parallel\.tp={least}"):
        shard_parameter(linear, "weight", Shard(0, blocks, 0, 4))
    shard_parameter(linear, "weight", Shard(0, blocks, least - 1, least))


def test_a_gradient_is_partial_where_it_is_marked_only() -> None:
    first, second = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1))
    mark_partial_gradient(first)
    assert has_partial_gradient(first)
    assert not has_partial_gradient(second)
