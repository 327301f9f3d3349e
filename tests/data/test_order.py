from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pipekit.data.order import SampleOrder
from pipekit.errors import DataError

SEEDS = st.integers(min_value=0, max_value=2**40)


@settings(max_examples=150, deadline=None)
@given(num_samples=st.integers(1, 5000), seed=SEEDS, epoch=st.integers(0, 1000))
@example(num_samples=1, seed=0, epoch=0)
@example(num_samples=2, seed=0, epoch=0)
@example(num_samples=3, seed=0, epoch=0)
@example(num_samples=4096, seed=0, epoch=0)
@example(num_samples=4097, seed=0, epoch=0)
def test_every_epoch_is_a_permutation(num_samples: int, seed: int, epoch: int) -> None:
    indices = SampleOrder(num_samples, seed).indices(epoch * num_samples, num_samples)
    assert np.array_equal(np.sort(indices), np.arange(num_samples))


@settings(max_examples=100, deadline=None)
@given(
    num_samples=st.integers(1, 300),
    seed=SEEDS,
    shuffle=st.booleans(),
    start=st.integers(0, 10_000),
    counts=st.lists(st.integers(0, 200), max_size=6),
)
def test_any_split_of_a_range_gives_the_same_samples(
    num_samples: int, seed: int, shuffle: bool, start: int, counts: list[int]
) -> None:
    order = SampleOrder(num_samples, seed, shuffle)
    starts = list(itertools.accumulate(counts, initial=start))
    parts = [order.indices(first, count) for first, count in zip(starts, counts, strict=False)]
    joined = np.concatenate([*parts, np.empty(0, dtype=np.int64)])
    assert np.array_equal(joined, order.indices(start, sum(counts)))


def test_epochs_and_seeds_differ() -> None:
    order = SampleOrder(1000, seed=1)
    epochs = [order.indices(epoch * 1000, 1000) for epoch in range(5)]
    epochs += [SampleOrder(1000, seed=seed).indices(0, 1000) for seed in (2, 3)]
    for one, other in itertools.combinations(epochs, 2):
        assert (one == other).mean() < 0.02  # two random permutations of n agree in about one place


def test_without_shuffle_it_is_the_identity() -> None:
    assert SampleOrder(5, seed=1, shuffle=False).indices(3, 9).tolist() == [3, 4, 0, 1, 2, 3, 4, 0, 1]


@pytest.mark.parametrize("num_samples", [4, 10, 97])
def test_every_sample_is_equally_likely_at_every_place(num_samples: int) -> None:
    num_epochs = 4000
    indices = SampleOrder(num_samples, seed=7).indices(0, num_samples * num_epochs)
    counts = np.zeros((num_samples, num_samples))
    np.add.at(counts, (np.tile(np.arange(num_samples), num_epochs), indices), 1)
    expected = num_epochs / num_samples
    chi_square = ((counts - expected) ** 2 / expected).sum()
    freedom = (num_samples - 1) ** 2
    assert abs(chi_square - freedom) < 5 * np.sqrt(2 * freedom)


def test_neighbours_are_torn_apart() -> None:
    indices = SampleOrder(100_000, seed=3).indices(0, 100_000)
    distances = np.abs(np.diff(indices))
    assert abs(distances.mean() / 100_000 - 1 / 3) < 0.01  # of two random places on a line of length 1
    assert (distances == 1).mean() < 0.001


def test_the_order_is_fixed_for_good() -> None:
    # A checkpoint holds only a position: another order in a later version would repeat and lose samples.
    first, second = [6, 5, 3, 2, 9, 0, 7, 4, 1, 8], [6, 8, 4, 9, 7, 3, 2, 5, 0, 1]
    assert SampleOrder(10, seed=1234).indices(0, 20).tolist() == first + second


def test_a_huge_dataset_costs_nothing() -> None:
    indices = SampleOrder(10**13, seed=0).indices(10**13 - 500, 1000)
    assert indices.min() >= 0
    assert indices.max() < 10**13
    assert len(set(indices.tolist())) == 1000


def test_no_samples_are_refused() -> None:
    with pytest.raises(DataError, match="0 samples"):
        SampleOrder(0, seed=1)
