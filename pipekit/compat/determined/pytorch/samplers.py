"""Samplers by the names and arguments of `determined.pytorch.samplers`: pipekit's, which take `num_replicas`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pipekit.data.samplers as ours
from pipekit.data.samplers import RepeatSampler as RepeatSampler
from pipekit.data.samplers import ReproducibleShuffleSampler as ReproducibleShuffleSampler
from pipekit.data.samplers import SkipSampler as SkipSampler


class DistributedSampler(ours.DistributedSampler):
    """Yields the samples of one worker (a replica counts as one); none is repeated to make their numbers equal."""

    def __init__(self, sampler: Iterable[Any], num_workers: int, rank: int) -> None:
        super().__init__(sampler, num_replicas=num_workers, rank=rank)


class DistributedBatchSampler(ours.DistributedBatchSampler):
    """Yields the batches of one worker; a replica counts as one."""

    def __init__(self, batch_sampler: Iterable[Any], num_workers: int, rank: int) -> None:
        super().__init__(batch_sampler, num_replicas=num_workers, rank=rank)


class RepeatBatchSampler(ours.RepeatBatchSampler):
    """Yields a batch sampler's batches epoch after epoch, endlessly."""

    def __init__(self, batch_sampler: Iterable[Any]) -> None:
        super().__init__(batch_sampler)


class SkipBatchSampler(ours.SkipBatchSampler):
    """Yields a batch sampler's batches without the first `skip` of them."""

    def __init__(self, batch_sampler: Iterable[Any], skip: int) -> None:
        super().__init__(batch_sampler, skip)


class ReproducibleShuffleBatchSampler(ours.ReproducibleShuffleBatchSampler):
    """Shuffles whole batches, whose samples stay together."""

    def __init__(self, batch_sampler: Iterable[Any], seed: int) -> None:
        super().__init__(batch_sampler, seed)
