"""Reproducible data loaders: torch's, with a seeded order, sharding over replicas, and exact resumption."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import chain, count
from typing import Any

import numpy as np
import torch
import torch.utils.data
from torch import Tensor
from torch.utils.data import BatchSampler, IterableDataset

from pipekit.data.randomness import OwnRandomness
from pipekit.data.samplers import (
    ReproducibleShuffleSampler,
    adapt_batch_sampler,
    exact_length,
    iterate_from,
    of_epoch,
)
from pipekit.data.stream import Stream, draw_apart, nothing_left
from pipekit.errors import DataError
from pipekit.rng import fold_seed


class DataLoader:
    """Data loader with the arguments of `torch.utils.data.DataLoader`, whose batches are the same in every run.

    The batches of all epochs are numbered in one order, which depends only on the seed. `get_data_loader` returns
    torch's loader for any replica, starting at any batch: replica `r` of `n` reads the batches `r`, `r + n`, `r + 2n`
    and so on. Whatever the number of replicas and workers, and wherever a run is resumed, all replicas together read
    the same batches as one uninterrupted replica.

    Random numbers that the dataset and `collate_fn` draw from the global generators of torch (CPU), numpy and `random`
    are seeded by the number of the batch, and do not affect the model's. Those that your own sampler draws are seeded
    by the epoch, and so is the sampler's `generator`, if it has one.

    An iterable dataset must yield its whole stream, the same each time, on every replica and in every worker. Its
    random numbers are seeded by the epoch, and `get_worker_info` returns None while it is read. Each worker reads the
    whole stream and collates only its own batches, so expensive work, such as decoding, belongs in `collate_fn`. A
    resumed run reads the stream from the beginning up to the position where it resumes.

    Args:
        dataset: a map-style dataset or an `IterableDataset`.
        batch_size: samples in a batch of one replica; None if each item of the dataset is already a batch.
        shuffle: whether to shuffle the samples anew in every epoch.
        sampler: yields the indices of samples, in place of `shuffle`: of the whole dataset, the same on all replicas.
        batch_sampler: yields lists of indices, in place of `batch_size`, `shuffle`, `sampler` and `drop_last`.
        num_workers: worker processes that read batches; 0 reads them in the process that uses them.
        collate_fn: makes a batch from a list of samples; `default_collate` by default.
        pin_memory: whether to put batches into pinned memory; has no effect without a GPU.
        drop_last: whether to leave out the last batch of an epoch if it is smaller.
        timeout: longest wait for a worker's batch in seconds; 0 sets no limit.
        worker_init_fn: called in each worker with its index.
        multiprocessing_context: start method of the workers.
        generator: its `initial_seed()` is the seed if `seed` is None.
        seed: seed of the order and of all random numbers.
        prefetch_factor: batches that each worker reads ahead.
        persistent_workers: whether workers outlive an iterator.
        pin_memory_device: device for `pin_memory`; by default the accelerator present.
        in_order: must be True: otherwise the order of batches would differ in every run.

    Raises:
        DataError: if torch refuses the arguments, or the order would differ from run to run.

    Example:
        >>> loader = DataLoader(range(10), batch_size=2)
        >>> [batch.tolist() for batch in loader.get_data_loader(skip=1, num_replicas=2, rank=1)]
        [[6, 7]]
    """

    def __init__(
        self,
        dataset: Any,
        batch_size: int | None = 1,
        shuffle: bool | None = None,
        sampler: Iterable[int] | None = None,
        batch_sampler: Iterable[list[int]] | None = None,
        num_workers: int = 0,
        collate_fn: Callable[[list[Any]], Any] | None = None,
        pin_memory: bool = False,
        drop_last: bool = False,
        timeout: float = 0,
        worker_init_fn: Callable[[int], None] | None = None,
        multiprocessing_context: Any = None,
        generator: torch.Generator | None = None,
        *,
        seed: int | None = None,
        prefetch_factor: int | None = None,
        persistent_workers: bool = False,
        pin_memory_device: str = "",
        in_order: bool = True,
    ) -> None:
        self.dataset = dataset
        self.batch_size = batch_size
        self.seed = generator.initial_seed() if seed is None and generator is not None else seed
        self._is_iterable = isinstance(dataset, IterableDataset)
        _check(dataset, shuffle, sampler, batch_sampler)
        if not in_order:
            raise DataError(
                "DataLoader: in_order=False hands batches out as workers finish them, in another order in every run; "
                "leave it out"
            )
        self._workers: dict[str, Any] = {
            "num_workers": num_workers,
            "pin_memory": pin_memory and torch.accelerator.is_available(),
            "timeout": timeout,
            "worker_init_fn": worker_init_fn,
            "multiprocessing_context": multiprocessing_context,
            "prefetch_factor": prefetch_factor,
            "persistent_workers": persistent_workers,
            "pin_memory_device": pin_memory_device,
        }
        try:
            # Torch checks the arguments.
            plain = torch.utils.data.DataLoader(
                dataset, batch_size, shuffle, sampler, batch_sampler,
                collate_fn=collate_fn, drop_last=drop_last, **self._workers,
            )  # fmt: skip
        except (TypeError, ValueError) as error:
            raise DataError(f"DataLoader of a {type(dataset).__name__}: {error}") from error
        self._drop_last = drop_last
        self._shuffle = bool(shuffle)
        self._samplers = (sampler, batch_sampler)
        self._collate: Callable[[list[Any]], Any] = plain.collate_fn
        if batch_size is None and batch_sampler is None:
            self._collate = _CollateItem(self._collate)

    def __len__(self) -> int:
        """Number of batches in one epoch, over all replicas."""
        if not self._is_iterable:
            return len(self._batches(0))  # type: ignore[arg-type]
        size = self.batch_size or 1
        return (len(self.dataset) + (0 if self._drop_last else size - 1)) // size

    def __iter__(self) -> Iterator[Any]:
        """Iterate over all replicas' batches of the first epoch."""
        return iter(self.get_data_loader())

    def get_data_loader(
        self,
        repeat: bool = False,
        skip: int = 0,
        num_replicas: int = 1,
        rank: int = 0,
        *,
        num_micro_batches: int = 1,
        seed: int = 0,
    ) -> torch.utils.data.DataLoader[Any]:
        """Return torch's data loader for the batches of one replica.

        Args:
            repeat: whether to continue with the next epoch after each, without end.
            skip: number of batches that this replica has already read.
            num_replicas: the data-parallel degree.
            rank: index of this replica.
            num_micro_batches: number of micro-batches, which the loader yields, in one batch that `skip` counts.
            seed: seed to use if the loader has neither a seed nor a generator.

        Raises:
            DataError: if `rank` is not in `[0, num_replicas)`, if `skip` is negative or beyond the data, or if an
                iterable dataset can be read only once. If only reading shows this, the iterator raises it.
        """
        seed = self.seed if self.seed is not None else seed
        skip *= num_micro_batches
        batches = adapt_batch_sampler(self._batches(seed), repeat, skip, num_replicas, rank)
        dataset: Any
        if self._is_iterable:
            if isinstance(self.dataset, Iterator):
                raise DataError(
                    f"DataLoader: the {type(self.dataset).__name__} is its own iterator, which can be read only once; "
                    "return a new iterator from __iter__"
                )
            dataset = Stream(
                self.dataset,
                collate=self._collate,
                batch_size=self.batch_size or 1,
                drop_last=self._drop_last,
                seed=seed,
                repeat=repeat,
                numbers=(skip * num_replicas + rank, num_replicas),
            )
            order: dict[str, Any] = {"batch_size": None}
        else:
            length = exact_length(self._batches(seed))
            if not repeat and length is not None and skip * num_replicas > length + num_replicas - 1:
                raise nothing_left(skip, length)
            dataset = _Reader(self.dataset, collate=self._collate, seed=seed)
            order = {"batch_sampler": _Numbered(batches, skip * num_replicas + rank, num_replicas)}
        return torch.utils.data.DataLoader(
            dataset,
            collate_fn=_as_it_is,
            # Without it, torch draws from the model's generator.
            generator=torch.Generator().manual_seed(seed),
            **order,
            **self._workers,
        )

    def _batches(self, seed: int) -> Iterable[list[int]]:
        """Batch sampler of one epoch, with the batches of all replicas."""
        sampler, batch_sampler = self._samplers
        if self._is_iterable:
            return []
        if batch_sampler is None:
            if sampler is None:
                indices = range(len(self.dataset))
                sampler = ReproducibleShuffleSampler(indices, seed) if self._shuffle else indices
            batch_sampler = BatchSampler(sampler, self.batch_size or 1, self._drop_last)
        is_own = any(given is not None for given in self._samplers)
        return _SeededSampler(batch_sampler, seed) if is_own and exact_length(batch_sampler) is None else batch_sampler


def data_length(batch: Any) -> int:
    """Count the samples of a batch: the first dimension of its first tensor or array.

    Args:
        batch: tensors and arrays `(B, ...)` in tuples, lists and dicts; other values are ignored.

    Raises:
        DataError: if no tensor or array has a dimension.

    Example:
        >>> data_length({"name": "x", "images": (torch.zeros(3, 8, 8), torch.zeros(3))})
        3
    """
    length = _length(batch)
    if length is None:
        raise DataError(
            f"a batch of the type {type(batch).__name__} has no tensor or array (B, ...) from which to count its "
            "samples; override get_batch_length"
        )
    return length


def _length(batch: Any) -> int | None:
    if isinstance(batch, Tensor | np.ndarray):
        return batch.shape[0] if batch.ndim else None
    parts = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, tuple | list) else ()
    return next((length for part in parts if (length := _length(part)) is not None), None)


def _check(dataset: Any, shuffle: bool | None, sampler: Any, batch_sampler: Any) -> None:
    kind = type(dataset).__name__
    if isinstance(dataset, IterableDataset):
        given = {"shuffle": bool(shuffle), "sampler": sampler is not None, "batch_sampler": batch_sampler is not None}
        for name in (name for name, is_given in given.items() if is_given):
            raise DataError(
                f"DataLoader: {name} needs a map-style dataset, and {kind} is an IterableDataset, which has its own "
                "order; shuffle in its __iter__, where draws of torch, numpy and random are seeded by the epoch"
            )
    elif not hasattr(dataset, "__getitem__"):
        raise DataError(
            f"DataLoader: {kind} has no __getitem__; give a map-style dataset, with __len__ and __getitem__, or an "
            "IterableDataset"
        )
    inside = [sampler, batch_sampler, getattr(batch_sampler, "sampler", None)]
    if any(isinstance(each, torch.utils.data.DistributedSampler) for each in inside):
        raise DataError(
            "DataLoader: torch's DistributedSampler would shard the data once more; give a sampler of the whole "
            "dataset, or shuffle=True, since get_data_loader shards by num_replicas and rank"
        )


def _as_it_is(batch: Any) -> Any:
    return batch


class _CollateItem:
    """Converts the only item of a list to a batch, for datasets whose items are batches."""

    def __init__(self, convert: Callable[[Any], Any]) -> None:
        self._convert = convert

    def __call__(self, items: list[Any]) -> Any:
        return self._convert(items[0])


class _SeededSampler:
    """A user's batch sampler, whose draws from global generators are seeded by the epoch."""

    def __init__(self, batch_sampler: Iterable[list[int]], seed: int) -> None:
        self._batch_sampler = batch_sampler
        self._seed = seed
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self._epoch = epoch

    def __len__(self) -> int:
        return len(self._batch_sampler)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[list[int]]:
        seed = fold_seed(self._seed, "sampler", self._epoch)
        return chain.from_iterable(draw_apart(of_epoch(self._batch_sampler, self._epoch), seed, 1))


class _Numbered:
    """Batches of indices, each with its number among those of all replicas and epochs."""

    def __init__(self, batches: Iterable[list[int]], first: int, step: int) -> None:
        self.batches = batches
        self._first, self._step = first, step

    def __len__(self) -> int:
        return len(self.batches)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[tuple[int, list[int]]]:
        return zip(count(self._first, self._step), iterate_from(self.batches, 0), strict=False)


class _Reader:
    """A map-style dataset that returns collated batches of numbered indices, and is otherwise the user's dataset."""

    def __init__(self, dataset: Any, *, collate: Callable[[list[Any]], Any], seed: int) -> None:
        self.dataset = dataset
        self._collate = collate
        self._seed = seed
        self._randomness = OwnRandomness()

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: Any) -> Any:
        return self.dataset[index]

    def __getitems__(self, batch: tuple[int, list[int]]) -> Any:
        number, indices = batch
        read_many = getattr(self.dataset, "__getitems__", None)
        with self._randomness.reseed(fold_seed(self._seed, "batch", number)):
            return self._collate(read_many(indices) if read_many else [self.dataset[index] for index in indices])

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "dataset":  # not there yet where a worker unpickles it
            raise AttributeError(name)
        return getattr(self.dataset, name)
