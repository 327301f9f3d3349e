from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import TensorDataset

from pipekit.data.batch_loader import BatchLoader
from pipekit.data.order import SampleOrder
from pipekit.errors import ConfigError, DataError


def numbered_dataset(num_samples: int) -> TensorDataset:
    """Sample `i` has inputs `[i, i]` and label `-i`."""
    numbers = torch.arange(num_samples)
    return TensorDataset(torch.stack([numbers, numbers], dim=1), -numbers)


def read_step(
    num_samples: int, consumed_samples: int, *, dp: int, micro_batch_size: int, num_micro_batches: int
) -> Any:
    """Return the sample numbers of one step, rank after rank, and the size of the global batch."""
    global_batch_size = dp * micro_batch_size * num_micro_batches
    numbers: list[int] = []
    for dp_rank in range(dp):
        loader = BatchLoader(
            numbered_dataset(num_samples),
            SampleOrder(num_samples, seed=5),
            global_batch_size=global_batch_size,
            micro_batch_size=micro_batch_size,
            dp_rank=dp_rank,
            dp=dp,
        )
        batches = loader.step_batches(consumed_samples)
        assert len(batches) == num_micro_batches
        for inputs, labels in batches:
            assert inputs.shape == (micro_batch_size, 2)
            assert torch.equal(inputs[:, 0], -labels)
            numbers += inputs[:, 0].tolist()
    return numbers, global_batch_size


@settings(max_examples=100, deadline=None)
@given(
    num_samples=st.integers(1, 60),
    consumed_samples=st.integers(0, 500),
    dp=st.integers(1, 4),
    micro_batch_size=st.integers(1, 4),
    num_micro_batches=st.integers(1, 4),
)
def test_all_ranks_together_read_the_global_batch_in_order(
    num_samples: int, consumed_samples: int, dp: int, micro_batch_size: int, num_micro_batches: int
) -> None:
    numbers, global_batch_size = read_step(
        num_samples,
        consumed_samples,
        dp=dp,
        micro_batch_size=micro_batch_size,
        num_micro_batches=num_micro_batches,
    )
    expected = SampleOrder(num_samples, seed=5).indices(consumed_samples, global_batch_size)
    assert numbers == expected.tolist()


@settings(max_examples=50, deadline=None)
@given(
    num_samples=st.integers(1, 100),
    steps=st.lists(st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 3)), min_size=1, max_size=6),
)
def test_changing_the_layout_loses_and_repeats_nothing(num_samples: int, steps: list[tuple[int, int, int]]) -> None:
    numbers: list[int] = []
    for dp, micro_batch_size, num_micro_batches in steps:
        step, _ = read_step(
            num_samples,
            len(numbers),
            dp=dp,
            micro_batch_size=micro_batch_size,
            num_micro_batches=num_micro_batches,
        )
        numbers += step
    counts = np.bincount(numbers, minlength=num_samples)
    assert counts.max() - counts.min() <= 1  # whole epochs and the start of one more


def test_validation_reads_from_the_start_in_order() -> None:
    loader = BatchLoader(
        numbered_dataset(6), SampleOrder(6, seed=0, shuffle=False), global_batch_size=4, micro_batch_size=2
    )
    assert [labels.tolist() for _, labels in loader.step_batches(0)] == [[0, -1], [-2, -3]]
    assert [labels.tolist() for _, labels in loader.step_batches(4)] == [[-4, -5], [0, -1]]


class NumpyPairs:
    """A user's own dataset: no torch class, numpy inputs and a plain number as label."""

    def __len__(self) -> int:
        return 3

    def __getitem__(self, index: int) -> list[Any]:
        return [np.full(2, index, dtype=np.float32), index]


def test_a_users_own_dataset_is_stacked() -> None:
    loader = BatchLoader(NumpyPairs(), SampleOrder(3, 0, shuffle=False), global_batch_size=3, micro_batch_size=3)
    ((inputs, labels),) = loader.step_batches(0)
    assert inputs.tolist() == [[0, 0], [1, 1], [2, 2]]
    assert inputs.dtype == torch.float32
    assert labels.tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    ("samples", "what"),
    [
        ([torch.zeros(3)] * 2, "sample 0 of list is one Tensor; return a pair"),
        ([(1, 2, 3)] * 2, "sample 0 of list is a tuple of 3"),
        ([(torch.zeros(1), 0), (torch.zeros(2), 0)], r"samples \[0, 1\] of list cannot be stacked"),
    ],
)
def test_samples_that_are_no_pairs_are_refused(samples: list[Any], what: str) -> None:
    loader = BatchLoader(samples, SampleOrder(2, 0, shuffle=False), global_batch_size=2, micro_batch_size=2)
    with pytest.raises(DataError, match=what):
        loader.step_batches(0)


def test_sizes_that_do_not_divide_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"global_batch_size=10 .*micro_batch_size=2 x dp=3; try .*=6 or 12"):
        BatchLoader(numbered_dataset(9), SampleOrder(9, 0), global_batch_size=10, micro_batch_size=2, dp=3)
    with pytest.raises(ConfigError, match="dp_rank=2"):
        BatchLoader(numbered_dataset(9), SampleOrder(9, 0), global_batch_size=4, micro_batch_size=2, dp_rank=2, dp=2)
    with pytest.raises(DataError, match="for 8 samples and the dataset has 9"):
        BatchLoader(numbered_dataset(9), SampleOrder(8, 0), global_batch_size=2, micro_batch_size=2)


@pytest.mark.parametrize("dp", [1, 2])
def test_steps_whose_sizes_differ_follow_each_other(dp: int) -> None:
    sizes = {0: 4, 4: 8, 12: 12}
    numbers: list[int] = []
    for position, size in sizes.items():
        for rank in range(dp):
            loader = BatchLoader(
                numbered_dataset(30),
                SampleOrder(30, seed=0, shuffle=False),
                global_batch_size=12,
                micro_batch_size=2,
                dp_rank=rank,
                dp=dp,
                batch_size_at=sizes.__getitem__,
            )
            assert (loader.num_micro_batches(position), loader.end_of_step(position)) == (
                size // 2 // dp,
                position + size,
            )
            numbers += [-number for _, labels in loader.step_batches(position) for number in labels.tolist()]
    assert numbers == list(range(24))
