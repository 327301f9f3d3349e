"""A reproducible data loader: torch's, with a seeded order, sharding over replicas, and exact resumption."""

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
    """A data loader with the arguments of `torch.utils.data.DataLoader`, whose batches are the same in every run.

    The batches of all epochs are numbered, in one order that depends on the seed alone. `get_data_loader` returns
    torch's loader for any replica and from any batch on: replica `r` of `n` reads the batches `r`, `r + n`, `r + 2n`
    and so on. However many replicas and worker processes there are, and wherever a run is resumed, together they read
    what one uninterrupted replica reads.

    What the dataset and `collate_fn` draw from the global generators of torch (CPU), numpy and `random` is seeded by
    the number of the batch, and does not disturb the model's draws. What a sampler of your own draws from them is
    seeded by the epoch; so is a `generator` of its own.

    An iterable dataset must yield its whole stream, the same each time, on every replica and in every worker; its draws
    are seeded by the epoch, and `get_worker_info` returns None while it is read. Each worker reads the whole stream and
    collates only its own batches, so expensive work, such as decoding, belongs in `collate_fn`. A resumed run reads
    the stream up to where it goes on.

    Args:
        dataset: map-style, or an `IterableDataset`.
        batch_size: samples of a batch of one replica; None where each item of the dataset is a batch already.
        shuffle: whether every epoch has an order of its own.
        sampler: yields the indices of samples, in place of `shuffle`: of the whole dataset, the same on all replicas.
        batch_sampler: yields lists of indices, in place of `batch_size`, `shuffle`, `sampler` and `drop_last`.
        num_workers: processes that read batches; 0 reads them where they are used.
        collate_fn: makes a batch of a list of samples; `default_collate` unless given.
        pin_memory: whether to put batches into pinned memory, where there is a GPU.
        drop_last: whether to leave out the last batch of an epoch where it is smaller.
        timeout: most seconds to wait for a worker's batch; 0 waits for ever.
        worker_init_fn: called in each worker with its index.
        multiprocessing_context: how workers are started.
        generator: gives the seed, its `initial_seed()`, where `seed` does not.
        seed: of the order and of all draws.
        prefetch_factor: batches that each worker reads ahead.
        persistent_workers: whether workers outlive an iterator.
        pin_memory_device: for `pin_memory`; the present accelerator unless given.
        in_order: not taken as False, since batches would come in another order in every run.

    Raises:
        DataError: if torch refuses the arguments, or the order would not be the same in every run.

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
        """Batches of one epoch, those of all replicas together."""
        if not self._is_iterable:
            return len(self._batches(0))  # type: ignore[arg-type]
        size = self.batch_size or 1
        return (len(self.dataset) + (0 if self._drop_last else size - 1)) // size

    def __iter__(self) -> Iterator[Any]:
        """Iterate over the batches of the first epoch, those of all replicas."""
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
        """Return torch's loader of one replica's batches.

        Args:
            repeat: whether to go on with the next epoch at the end of each, without end.
            skip: batches that this replica has read before.
            num_replicas: the data-parallel degree.
            rank: index of this replica among them.
            num_micro_batches: what the loader yields are micro-batches, so many of which are one batch of `skip`.
            seed: where the loader was given neither a seed nor a generator.

        Raises:
            DataError: if `rank` is not in `[0, num_replicas)`, if `skip` is negative or beyond the data, or if an
                iterable dataset cannot be read anew; where only reading shows it, from the iterator.
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
        """The batch sampler of one epoch, all replicas' batches."""
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
        batch: tensors and arrays `(B, ...)` in tuples, lists and dicts; what else is in them is passed over.

    Raises:
        DataError: if there is none that has a dimension.

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
    """Makes a batch of the only item in a list, for datasets of whole batches."""

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
    """A map-style dataset that returns collated batches of numbered indices, and is the user's in all else."""

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
