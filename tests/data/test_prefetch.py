from __future__ import annotations

import threading
import traceback
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from pipekit.data import prefetch
from pipekit.data.batch_loader import BatchLoader
from pipekit.data.order import SampleOrder
from pipekit.data.prefetch import Prefetcher
from pipekit.errors import DataError


class Samples:
    """Twelve samples, the numbers of those that were read, and a gate that holds the fifth back while it is shut."""

    def __init__(self) -> None:
        self.read: list[int] = []
        self.is_at_gate = threading.Event()
        self.gate = threading.Event()
        self.gate.set()

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> Any:
        if index == 4:
            self.is_at_gate.set()
            assert self.gate.wait(60.0)
        self.read.append(index)
        if index == 7:
            raise OSError("sample 7 cannot be read")
        return torch.tensor(index), 0


@pytest.fixture
def samples() -> Samples:
    return Samples()


@pytest.fixture
def prefetcher(samples: Samples) -> Iterator[Prefetcher]:
    loader = BatchLoader(samples, SampleOrder(12, 0, shuffle=False), global_batch_size=3, micro_batch_size=1)
    prefetcher = Prefetcher(loader)
    yield prefetcher
    samples.gate.set()
    prefetcher.close()


def numbers(batches: list[Any]) -> list[int]:
    return [int(inputs) for inputs, _ in batches]


def running() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "pipekit-prefetch"]


def wait_until_collated() -> None:
    for thread in running():
        thread.join(60.0)


def test_one_step_is_collated_ahead_and_no_more(prefetcher: Prefetcher, samples: Samples) -> None:
    assert numbers(prefetcher.step_batches(0, then=3)) == [0, 1, 2]
    wait_until_collated()
    assert samples.read == [0, 1, 2, 3, 4, 5]
    assert numbers(prefetcher.step_batches(3)) == [3, 4, 5]
    assert samples.read == [0, 1, 2, 3, 4, 5]


def test_a_step_elsewhere_than_was_collated_gets_its_own_batches(prefetcher: Prefetcher) -> None:
    prefetcher.step_batches(0, then=3)
    assert numbers(prefetcher.step_batches(9, then=0)) == [9, 10, 11]
    assert numbers(prefetcher.step_batches(0)) == [0, 1, 2]


def test_an_error_of_the_dataset_arises_where_its_step_is_read(prefetcher: Prefetcher) -> None:
    prefetcher.step_batches(3, then=6)
    for _ in range(2):
        with pytest.raises(OSError, match="sample 7 cannot be read") as error:
            prefetcher.step_batches(6)
        assert "__getitem__" in "".join(traceback.format_tb(error.tb))
    assert numbers(prefetcher.step_batches(9)) == [9, 10, 11]


def test_a_sample_that_is_no_pair_is_named_as_by_the_loader() -> None:
    loader = BatchLoader([torch.zeros(3)] * 2, SampleOrder(2, 0), global_batch_size=2, micro_batch_size=2)
    with pytest.raises(DataError, match="of list is one Tensor; return a pair"):
        Prefetcher(loader).step_batches(0)


def test_a_dataset_that_does_not_answer_does_not_keep_a_run_from_ending(
    prefetcher: Prefetcher, samples: Samples, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prefetch, "_PATIENCE_S", 0.01)
    samples.gate.clear()
    prefetcher.step_batches(0, then=3)
    assert samples.is_at_gate.wait(60.0)
    prefetcher.close()
    samples.gate.set()
    wait_until_collated()
    # The sample that was being read then was the last.
    assert samples.read == [0, 1, 2, 3, 4]
