"""Samplers that shuffle, repeat, shard and skip the indices of another sampler, the same in every run.

Each class wraps a sampler of samples, and its counterpart with `Batch` in the name wraps a sampler of batches. Wrap in
this order: shuffle, repeat, shard, skip. The order depends only on the seed and the epoch, not on how often a sampler
was iterated over; `RepeatSampler` passes the epoch to every sampler inside it.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterable, Iterator, Sequence, Sized
from typing import Any, TypeGuard

import torch
from torch.utils.data import BatchSampler, Sampler

from pipekit.data.order import SampleOrder
from pipekit.errors import DataError
from pipekit.rng import fold_seed

# Indices of a shuffled order that are computed at a time.
_CHUNK = 4096


class _WrappingSampler(Sampler[Any]):
    """A sampler of another sampler's items, which can begin at any position."""

    def __init__(self, sampler: Iterable[Any]) -> None:
        if isinstance(sampler, Iterator):
            raise DataError(
                f"{type(self).__name__}: a {type(sampler).__name__} can be read only once, and a sampler anew in every "
                "epoch; give an object whose __iter__ returns a new iterator, such as a list or a torch Sampler"
            )
        self.sampler = sampler

    def __iter__(self) -> Iterator[Any]:
        return self.iterate_from(0)

    def __len__(self) -> int:
        return _len(self.sampler)

    def iterate_from(self, position: int) -> Iterator[Any]:
        """Iterate over the items, starting at a position."""
        raise NotImplementedError


class ReproducibleShuffleSampler(_WrappingSampler):
    """Sampler that shuffles another sampler's items, in an order that depends only on `seed` and the epoch.

    Over `range(n)` it is the order of `SampleOrder(n, seed)`, and takes no memory.
    """

    def __init__(self, sampler: Iterable[Any], seed: int) -> None:
        super().__init__(sampler)
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch whose order to use; 0 is the first."""
        self.epoch = epoch

    def iterate_from(self, position: int) -> Iterator[Any]:
        """Iterate over the epoch's order, starting at a position."""
        items = self.sampler if isinstance(self.sampler, Sequence) else list(self.sampler)
        for start in range(position, len(items), _CHUNK):
            order = SampleOrder(len(items), self.seed)
            count = min(_CHUNK, len(items) - start)
            for index in order.indices(self.epoch * len(items) + start, count).tolist():
                yield items[index]


class RepeatSampler(_WrappingSampler):
    """Sampler that repeats another sampler's items epoch after epoch, without end; its length is that of one epoch.

    In each epoch, every sampler inside with a method `set_epoch` gets the epoch. A sampler with a `generator`, such as
    torch's random samplers, draws from a new one, seeded by the generator's initial seed and the epoch.

    Raises:
        DataError: during iteration, if an epoch has no item.
    """

    def iterate_from(self, position: int) -> Iterator[Any]:
        """Iterate over the items, starting at a position counted from the beginning of the first epoch."""
        length = exact_length(self.sampler)
        first_epoch, to_skip = divmod(position, length) if length else (0, position)
        for epoch in itertools.count(first_epoch):
            sampler, num_items = of_epoch(self.sampler, epoch), 0
            if length:
                num_items = length
                yield from iterate_from(sampler, to_skip)
                to_skip = 0
            else:
                for num_items, item in enumerate(sampler, start=1):  # noqa: B007
                    if to_skip == 0:
                        yield item
                    else:
                        to_skip -= 1
            if num_items == 0:
                raise DataError(
                    f"{type(self).__name__}: {type(self.sampler).__name__} has nothing in epoch {epoch}, so that "
                    "repeating it would never end; give more data, or a smaller batch_size where drop_last is set"
                )


class DistributedSampler(_WrappingSampler):
    """Sampler of one replica's items: every `num_replicas`-th item of another sampler, starting with item `rank`.

    At the end of the sampler, some replicas may get one item more than others; no item is repeated or left out. Unlike
    torch's class of this name, it does not shuffle and does not need the dataset.

    Raises:
        DataError: if `rank` is not in `[0, num_replicas)`.
    """

    def __init__(self, sampler: Iterable[Any], num_replicas: int, rank: int) -> None:
        super().__init__(sampler)
        if not 0 <= rank < num_replicas:
            raise DataError(
                f"{type(self).__name__}: rank={rank} and num_replicas={num_replicas}; give a rank from 0 to "
                "num_replicas - 1, such as mpu.data_parallel_rank and mpu.data_parallel_world_size"
            )
        self.num_replicas = num_replicas
        self.rank = rank

    def __len__(self) -> int:
        return len(range(self.rank, _len(self.sampler), self.num_replicas))

    def iterate_from(self, position: int) -> Iterator[Any]:
        """Iterate over this replica's items, starting at a position among them."""
        rest = iterate_from(self.sampler, position * self.num_replicas + self.rank)
        return itertools.islice(rest, 0, None, self.num_replicas)


class SkipSampler(_WrappingSampler):
    """Sampler that skips the first `skip` items of another sampler, to resume where a run ended.

    Always skip after repeating and sharding: then every epoch is whole, and the skipped items are this replica's.

    Raises:
        DataError: if `skip` is negative.
    """

    def __init__(self, sampler: Iterable[Any], skip: int) -> None:
        super().__init__(sampler)
        if skip < 0:
            raise DataError(f"{type(self).__name__}: skip={skip}; give the number of items to leave out, 0 or more")
        self.skip = skip

    def __len__(self) -> int:
        length = _len(self.sampler)
        return length if _is_endless(self.sampler) else max(0, length - self.skip)

    def iterate_from(self, position: int) -> Iterator[Any]:
        """Iterate over the items, starting at a position counted after the skipped items."""
        return iterate_from(self.sampler, self.skip + position)


class ReproducibleShuffleBatchSampler(ReproducibleShuffleSampler):
    """Batch sampler that shuffles whole batches; to shuffle samples, use `ReproducibleShuffleSampler`."""


class RepeatBatchSampler(RepeatSampler):
    """Batch sampler that repeats another's batches epoch after epoch, without end; its length is that of one epoch."""


class DistributedBatchSampler(DistributedSampler):
    """Batch sampler of one replica: every `num_replicas`-th batch of another, starting with batch `rank`."""


class SkipBatchSampler(SkipSampler):
    """Batch sampler that skips the first `skip` batches of another, to resume where a run ended."""


def adapt_batch_sampler(
    batch_sampler: Iterable[Any], repeat: bool = False, skip: int = 0, num_replicas: int = 1, rank: int = 0
) -> Iterable[Any]:
    """Repeat, shard and skip a batch sampler's batches, in this order.

    Args:
        batch_sampler: yields lists of indices, the same for all replicas.
        repeat: whether to continue with the next epoch after each, without end.
        skip: number of this replica's batches to skip.
        num_replicas: the data-parallel degree.
        rank: index of this replica.

    Raises:
        DataError: if `rank` is not in `[0, num_replicas)`, or `skip` is negative.

    Example:
        >>> batches = [[0, 1], [2, 3], [4]]
        >>> [list(adapt_batch_sampler(batches, skip=1, num_replicas=2, rank=rank)) for rank in (0, 1)]
        [[[4]], []]
        >>> endless = adapt_batch_sampler(batches, repeat=True, skip=1, num_replicas=2, rank=1)
        >>> list(itertools.islice(endless, 3))
        [[0, 1], [4], [2, 3]]
    """
    if repeat:
        batch_sampler = RepeatBatchSampler(batch_sampler)
    if (num_replicas, rank) != (1, 0):
        batch_sampler = DistributedBatchSampler(batch_sampler, num_replicas, rank)
    if skip != 0:
        batch_sampler = SkipBatchSampler(batch_sampler, skip)
    return batch_sampler


def iterate_from(sampler: Iterable[Any], position: int) -> Iterator[Any]:
    """Iterate over a sampler's items from a position; only foreign samplers are read up to that position."""
    if isinstance(sampler, _WrappingSampler):
        return sampler.iterate_from(position)
    if isinstance(sampler, Sequence):
        return iter(sampler[position:])
    if _is_torchs(sampler):
        rest = iterate_from(sampler.sampler, position * sampler.batch_size)
        return iter(BatchSampler(rest, sampler.batch_size, sampler.drop_last))
    return itertools.islice(sampler, position, None)


def exact_length(sampler: Iterable[Any]) -> int | None:
    """Count a sampler's items without reading them; None if only its own `__len__` gives it, which may be wrong."""
    if isinstance(sampler, Sequence):
        return len(sampler)
    if isinstance(sampler, ReproducibleShuffleSampler):
        return exact_length(sampler.sampler)
    if _is_torchs(sampler):
        length = exact_length(sampler.sampler)
        rest = 0 if sampler.drop_last else sampler.batch_size - 1
        return None if length is None else (length + rest) // sampler.batch_size
    return None


def of_epoch(sampler: Any, epoch: int) -> Any:
    """Return a sampler, or a copy of it, set to an epoch together with every sampler inside it."""
    generator = getattr(sampler, "generator", None)
    inside = {name: getattr(sampler, name) for name in ("sampler", "batch_sampler") if hasattr(sampler, name)}
    changed = {name: of_epoch(below, epoch) for name, below in inside.items()}
    if isinstance(generator, torch.Generator):
        seed = fold_seed(generator.initial_seed(), "epoch", epoch)
        changed["generator"] = torch.Generator(generator.device).manual_seed(seed)
    if not hasattr(sampler, "set_epoch") and all(value is inside.get(name) for name, value in changed.items()):
        return sampler
    sampler = copy.copy(sampler)
    for name, value in changed.items():
        setattr(sampler, name, value)
    if hasattr(sampler, "set_epoch"):
        sampler.set_epoch(epoch)
    return sampler


def _is_torchs(sampler: Any) -> TypeGuard[BatchSampler]:
    # A subclass may yield something else.
    return type(sampler) is BatchSampler


def _is_endless(sampler: Any) -> bool:
    below = getattr(sampler, "sampler", None)
    return isinstance(sampler, RepeatSampler) or (below is not None and _is_endless(below))


def _len(sampler: Iterable[Any]) -> int:
    if not isinstance(sampler, Sized):
        raise TypeError(f"{type(sampler).__name__} has no length")
    return len(sampler)
