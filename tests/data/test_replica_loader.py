"""The samples of a replica come in the order of torch's `DistributedSampler` without shuffling, again and again."""

from __future__ import annotations

from itertools import chain, islice, repeat
from typing import Any

import pytest
from torch.utils.data import DataLoader, DistributedSampler

from pipekit.data.replica_loader import ReplicaLoader
from pipekit.errors import DataError


def as_torch_reads(data: list[int], *, dp: int, dp_rank: int, micro_batch_size: int, drop_last: bool) -> Any:
    sampler: Any = DistributedSampler(data, num_replicas=dp, rank=dp_rank, shuffle=False)  # type: ignore[arg-type]
    loader = DataLoader(data, micro_batch_size, sampler=sampler, drop_last=drop_last, collate_fn=list)  # type: ignore[arg-type]
    return len(loader), chain.from_iterable(repeat(loader))


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize(
    ("size", "dp", "micro"), [(12, 1, 4), (11, 1, 2), (11, 2, 4), (13, 4, 3), (5, 2, 3), (8, 2, 1)]
)
def test_the_order_is_torchs(size: int, dp: int, micro: int, drop_last: bool) -> None:
    data = list(range(100, 100 + size))
    for dp_rank in range(dp):
        options: dict[str, Any] = {"dp": dp, "dp_rank": dp_rank, "micro_batch_size": micro, "drop_last": drop_last}
        length, expected = as_torch_reads(data, **options)
        loader = ReplicaLoader(data, num_micro_batches=3, collate=list, **options)
        assert len(loader) == length
        steps = [list(loader.iterate_step(position)) for position in range(0, 12, 3)]
        assert list(chain(*steps)) == list(islice(expected, 12))


def test_data_of_less_than_a_micro_batch_are_refused_if_it_is_dropped() -> None:
    with pytest.raises(DataError, match=r"has 3 samples for 2 replicas, less than a micro-batch of 4 each"):
        ReplicaLoader([1, 2, 3], micro_batch_size=4, num_micro_batches=1, dp_rank=0, dp=2, drop_last=True)
