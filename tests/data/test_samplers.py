"""Samplers, compared with plain lists."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import BatchSampler, RandomSampler, Sampler

from pipekit.data import (
    DistributedBatchSampler,
    DistributedSampler,
    RepeatBatchSampler,
    RepeatSampler,
    ReproducibleShuffleBatchSampler,
    ReproducibleShuffleSampler,
    SkipBatchSampler,
    SkipSampler,
    adapt_batch_sampler,
)
from pipekit.data.order import SampleOrder
from pipekit.errors import DataError


class Foreign(Sampler[int]):
    """A user's own sampler, which knows neither positions nor epochs, and whose length is wrong."""

    def __init__(self, items: list[int]) -> None:
        self.items = items

    def __len__(self) -> int:
        return len(self.items) + 3

    def __iter__(self) -> Iterator[int]:
        return iter(self.items)


class PerEpoch(Foreign):
    """A user's own sampler whose order and length depend on the epoch that it is told."""

    epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        return iter([100 * self.epoch + item for item in self.items[self.epoch % 2 :]])


@settings(max_examples=100, deadline=None)
@given(
    num_samples=st.integers(1, 30),
    batch_size=st.integers(1, 7),
    drop_last=st.booleans(),
    num_replicas=st.integers(1, 4),
    skip=st.integers(0, 40),
    kind=st.sampled_from(["plain", "shuffled", "foreign", "per epoch"]),
    repeat=st.booleans(),
)
def test_replicas_that_go_on_anywhere_together_yield_the_uninterrupted_order(
    num_samples: int, batch_size: int, drop_last: bool, num_replicas: int, skip: int, kind: str, repeat: bool
) -> None:
    base: Any = range(num_samples)
    epochs = [list(base) for _ in range(60)]
    if kind == "shuffled":
        order = SampleOrder(num_samples, seed=3)
        base = ReproducibleShuffleSampler(base, 3)
        epochs = [order.indices(epoch * num_samples, num_samples).tolist() for epoch in range(60)]
    elif kind == "foreign":
        base = Foreign(list(base))
    elif kind == "per epoch":
        base = PerEpoch(list(base))
        epochs = [[100 * epoch + item for item in range(epoch % 2, num_samples)] for epoch in range(60)]
    # By hand: every epoch cut into batches.
    cut = [[items[at : at + batch_size] for at in range(0, len(items), batch_size)] for items in epochs]
    kept = [[batch for batch in batches if len(batch) == batch_size or not drop_last] for batches in cut]
    if repeat and not all(kept):
        return  # an epoch without any batch is refused, see below
    expected = [batch for batches in kept for batch in batches]
    batches = BatchSampler(base, batch_size, drop_last)
    parts = [adapt_batch_sampler(batches, repeat, skip, num_replicas, rank) for rank in range(num_replicas)]
    if not repeat:
        read = [list(part) for part in parts]
        for rank, items in enumerate(read):
            assert items == kept[0][rank::num_replicas][skip:]
        return
    num_each = len(expected) // num_replicas - skip
    if num_each <= 0:
        return
    read = [list(itertools.islice(part, num_each)) for part in parts]
    in_turns = [batch for turn in zip(*read, strict=True) for batch in turn]
    assert in_turns == expected[skip * num_replicas :][: len(in_turns)]


@settings(max_examples=100, deadline=None)
@given(num_items=st.integers(1, 20), skip=st.integers(0, 25), num_replicas=st.integers(1, 4), rank=st.integers(0, 3))
def test_lengths_are_those_of_what_is_yielded(num_items: int, skip: int, num_replicas: int, rank: int) -> None:
    rank %= num_replicas
    items = list(range(num_items))
    for sampler in (
        SkipSampler(items, skip),
        DistributedSampler(items, num_replicas, rank),
        ReproducibleShuffleSampler(items, 0),
        SkipSampler(DistributedSampler(ReproducibleShuffleSampler(items, 0), num_replicas, rank), skip),
    ):
        assert len(sampler) == len(list(sampler))
    assert len(SkipSampler(RepeatSampler(items), skip)) == len(RepeatSampler(items)) == num_items


def test_the_second_names_wrap_batches() -> None:
    batches = [[0, 1], [2], [3, 4]]
    assert list(SkipBatchSampler(batches, 1)) == [[2], [3, 4]]
    assert list(DistributedBatchSampler(batches, 2, 0)) == [[0, 1], [3, 4]]
    assert list(itertools.islice(RepeatBatchSampler(batches), 4)) == [*batches, [0, 1]]
    shuffled = ReproducibleShuffleBatchSampler(batches, seed=1)
    assert sorted(shuffled) == sorted(batches)
    assert list(shuffled) == [batches[index] for index in SampleOrder(3, seed=1).indices(0, 3)]


def test_a_shuffled_sampler_is_the_same_each_time_it_is_read_and_another_in_the_next_epoch() -> None:
    sampler = ReproducibleShuffleSampler(Foreign(list(range(20))), seed=5)
    first = list(sampler)
    assert list(sampler) == first != list(range(20))
    sampler.set_epoch(1)
    assert sorted(sampler) == sorted(first)
    assert list(sampler) != first
    # An epoch that RepeatSampler tells is told to a copy.
    endless = list(itertools.islice(RepeatSampler(ReproducibleShuffleSampler(range(20), 5)), 40))
    assert endless == first + list(sampler)


def test_torchs_random_samplers_have_an_order_for_each_epoch_from_their_generator() -> None:
    def read(skip: int, count: int) -> list[Any]:
        sampler = RandomSampler(range(10), generator=torch.Generator().manual_seed(9))
        return list(itertools.islice(SkipSampler(RepeatSampler(sampler), skip), count))

    both = read(0, 20)
    assert sorted(both[:10]) == sorted(both[10:]) == list(range(10))
    assert both[:10] != both[10:]
    assert read(7, 13) == both[7:]
    generator = torch.Generator().manual_seed(9)
    state = generator.get_state()
    assert list(itertools.islice(RepeatSampler(RandomSampler(range(10), generator=generator)), 20)) == both
    assert torch.equal(generator.get_state(), state)  # the user's own generator is left alone


def test_a_far_position_is_not_counted_up_to() -> None:
    order = ReproducibleShuffleSampler(range(10**9), seed=0)
    far = adapt_batch_sampler(BatchSampler(order, 8, False), True, skip=10**12, num_replicas=3, rank=2)
    epoch, batch = divmod(3 * 10**12 + 2, 10**9 // 8)
    expected = SampleOrder(10**9, 0).indices(epoch * 10**9 + batch * 8, 8)
    assert next(iter(far)) == expected.tolist()


def test_bad_arguments_are_refused() -> None:
    with pytest.raises(DataError, match=r"SkipSampler: skip=-1; give"):
        SkipSampler([1], -1)
    for num_replicas, rank in ((2, 2), (2, -1), (0, 0)):
        with pytest.raises(DataError, match=rf"rank={rank} and num_replicas={num_replicas}; give a rank from 0"):
            adapt_batch_sampler([[1]], num_replicas=num_replicas, rank=rank)
    with pytest.raises(DataError, match="a list_iterator can be read only once"):
        RepeatSampler(iter([1]))
    with pytest.raises(DataError, match=r"BatchSampler has nothing in epoch 0"):
        next(iter(RepeatSampler(BatchSampler(range(3), 4, drop_last=True))))
    with pytest.raises(DataError, match=r"Foreign has nothing in epoch 0"):
        next(iter(RepeatSampler(Foreign([]))))
