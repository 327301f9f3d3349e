"""Streams: the batches of an iterable dataset that several replicas and workers read, and a resumed run reads again."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import count, islice
from typing import Any, TypeVar

from torch.utils.data import IterableDataset, get_worker_info
from torch.utils.data._utils import worker

from pipekit.data.randomness import OwnRandomness
from pipekit.errors import DataError
from pipekit.rng import fold_seed

T = TypeVar("T")


class Stream(IterableDataset[Any]):
    """The collated batches of one replica of an iterable dataset; in a worker, its share of them.

    Batches are cut from the whole stream and numbered, and every replica and worker keeps its own.

    Args:
        dataset: yields the same samples, up to its draws, whenever it is iterated over.
        collate: makes a batch of a list of samples.
        batch_size: samples of a batch.
        drop_last: whether to leave out a smaller batch at the end of an epoch.
        seed: of all draws.
        repeat: whether to go on with the next epoch at the end of each.
        numbers: number of the replica's first batch, and the number of replicas.

    Raises:
        DataError: from the iterator, if the first batch is beyond the end, or an epoch that is repeated has no batch.
    """

    def __init__(
        self,
        dataset: IterableDataset[Any],
        *,
        collate: Callable[[list[Any]], Any],
        batch_size: int,
        drop_last: bool,
        seed: int,
        repeat: bool,
        numbers: tuple[int, int],
    ) -> None:
        self.dataset = dataset
        self._collate = collate
        self._batch_size = batch_size
        self._drop_last = drop_last
        self._seed = seed
        self._repeat = repeat
        self._numbers = numbers

    def __iter__(self) -> Iterator[Any]:
        first, num_replicas = self._numbers
        info = get_worker_info()
        index, num_workers = (0, 1) if info is None else (info.id, info.num_workers)
        # Torch takes the batches of its workers in turns.
        mine = first + index * num_replicas
        number, randomness = -1, OwnRandomness()
        for number, samples in enumerate(self._all_batches()):
            if number >= mine and (number - mine) % (num_replicas * num_workers) == 0:
                with randomness.reseed(fold_seed(self._seed, "batch", number)):
                    batch = self._collate(samples)
                yield batch
        skip = first // num_replicas
        if skip * num_replicas > number + num_replicas:
            raise nothing_left(skip, number + 1)

    def _all_batches(self) -> Iterator[list[Any]]:
        for epoch in count() if self._repeat else (0,):
            num_batches = 0
            for samples in draw_apart(self.dataset, fold_seed(self._seed, "stream", epoch), self._batch_size):
                if len(samples) == self._batch_size or not self._drop_last:
                    num_batches += 1
                    yield samples
            if self._repeat and num_batches == 0:
                raise DataError(
                    f"DataLoader: {type(self.dataset).__name__} yields no batch of {self._batch_size} in epoch "
                    f"{epoch}, so that repeating it would never end; return a new iterator from each __iter__, and "
                    "give more data"
                )


def draw_apart(items: Iterable[T], seed: int, num_at_a_time: int) -> Iterator[list[T]]:
    """Iterate over items in lists, read with random states of their own, and as if in no worker."""
    randomness = OwnRandomness(seed)
    with randomness, _hide_worker():
        iterator = iter(items)
    while True:
        with randomness, _hide_worker():
            part = list(islice(iterator, num_at_a_time))
        if part:
            yield part
        if len(part) < num_at_a_time:
            return


def nothing_left(skip: int, num_batches: int) -> DataError:
    """Return the error of a run that would go on behind the end of its data."""
    return DataError(
        f"get_data_loader: skip={skip} goes beyond the data, which are {num_batches} batches for all replicas "
        "together; set repeat=True, or resume with the dataset and the batch_size of before"
    )


@contextmanager
def _hide_worker() -> Iterator[None]:
    """Let `get_worker_info` return None: a dataset that shards by it would lose samples, sharded once more here."""
    info, worker._worker_info = worker._worker_info, None
    try:
        yield
    finally:
        worker._worker_info = info
