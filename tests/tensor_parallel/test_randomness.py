"""Random numbers that tensor-parallel ranks draw alike, and those that each draws for itself.

Ranks run one after the other from the same seed here, since torch's default generator is the process's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pipekit.tensor_parallel import PlannedGroup, TensorGroup, sharded_dropout, sharded_randomness

Result = TypeVar("Result")


def on_each_rank(function: Callable[[TensorGroup], Result], *, size: int = 3, seed: int = 5) -> list[Result]:
    results = []
    with torch.random.fork_rng(devices=[]):
        for rank in range(size):
            torch.manual_seed(seed)
            results.append(function(PlannedGroup(rank, size)))
    return results


def draw(group: TensorGroup | None) -> Tensor:
    with sharded_randomness(group):
        return torch.rand(16)


def test_every_rank_draws_something_else() -> None:
    drawn = on_each_rank(draw)
    assert len({tuple(each.tolist()) for each in drawn}) == 3


def test_a_rank_draws_the_same_from_the_same_seed() -> None:
    first, again, other = on_each_rank(draw), on_each_rank(draw), on_each_rank(draw, seed=6)
    for rank in range(3):
        assert torch.equal(first[rank], again[rank])
        assert not torch.equal(first[rank], other[rank])


def test_sharded_randomness_draws_other_numbers_every_time() -> None:
    for first, second in on_each_rank(lambda group: (draw(group), draw(group))):
        assert not torch.equal(first, second)


def test_the_generator_is_left_alike_on_all_ranks_however_much_each_draws() -> None:
    def state_after(group: TensorGroup) -> Tensor:
        with sharded_randomness(group):
            torch.rand(100 * (1 + group.rank))
        return torch.get_rng_state()

    states = on_each_rank(state_after)
    for state in states:
        assert torch.equal(state, states[0])


def test_the_generator_is_left_alike_when_something_fails() -> None:
    def draw_and_fail(group: TensorGroup) -> None:
        with sharded_randomness(group):
            torch.rand(1 + group.rank)
            raise KeyError

    def state_after(group: TensorGroup) -> Tensor:
        with pytest.raises(KeyError):
            draw_and_fail(group)
        return torch.get_rng_state()

    failed, succeeded = on_each_rank(state_after), on_each_rank(lambda group: (draw(group), torch.get_rng_state())[1])
    for state in failed:
        assert torch.equal(state, succeeded[0])


def test_numbers_drawn_afterwards_differ_from_those_inside() -> None:
    for inside, after in on_each_rank(lambda group: (draw(group), torch.rand(16))):
        assert not torch.equal(inside, after)


def test_without_a_group_it_draws_as_outside() -> None:
    def together(group: TensorGroup) -> tuple[Tensor, Tensor]:
        return draw(None), torch.rand(4)

    def plainly(group: TensorGroup) -> tuple[Tensor, Tensor]:
        return torch.rand(16), torch.rand(4)

    for results, expected in zip(on_each_rank(together), on_each_rank(plainly), strict=True):
        assert torch.equal(results[0], expected[0])
        assert torch.equal(results[1], expected[1])


def test_masks_differ_between_ranks_and_are_of_the_right_share() -> None:
    masks = on_each_rank(lambda group: sharded_dropout(torch.ones(40, 50), 0.25, True, group))
    for mask in masks:
        torch.testing.assert_close(mask.unique(), torch.tensor([0.0, 1 / 0.75]))
        assert 0.2 < float((mask == 0).float().mean()) < 0.3
    for rank in range(3):
        for other in range(rank):
            # Independent masks agree in 0.75^2 + 0.25^2 of the elements.
            assert 0.55 < float((masks[rank] == masks[other]).float().mean()) < 0.7


def test_without_a_group_masks_are_alike_and_torchs() -> None:
    masks = on_each_rank(lambda group: sharded_dropout(torch.ones(20), 0.5, True, None))
    expected = on_each_rank(lambda group: F.dropout(torch.ones(20), 0.5))
    for mask in masks:
        assert torch.equal(mask, expected[0])


@pytest.mark.parametrize(("p", "training"), [(0.5, False), (0.0, True)])
def test_nothing_is_dropped_or_drawn_where_there_is_no_dropout(p: float, training: bool) -> None:
    x = torch.ones(20)

    def state_after(group: TensorGroup) -> Tensor:
        assert sharded_dropout(x, p, training, group) is x
        return torch.get_rng_state()

    for after, before in zip(on_each_rank(state_after), on_each_rank(lambda group: torch.get_rng_state()), strict=True):
        assert torch.equal(after, before)


def test_the_seed_is_drawn_on_the_cpu_whatever_the_default_device() -> None:
    def elsewhere(group: TensorGroup) -> Tensor:
        with torch.device("meta"):
            assert sharded_dropout(torch.ones(16), 0.5, True, group).device.type == "meta"
        return draw(group)

    def here(group: TensorGroup) -> Tensor:
        draw(group)
        return draw(group)

    for actual, expected in zip(on_each_rank(elsewhere), on_each_rank(here), strict=True):
        assert torch.equal(actual, expected)
