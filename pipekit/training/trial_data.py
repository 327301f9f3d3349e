"""The data of a trial: each rank's micro-batches for training, counted, and what it evaluates."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice, repeat
from typing import Any

from pipekit.data.data_loader import DataLoader
from pipekit.distributed.processes import gather_objects, raise_together
from pipekit.errors import CheckpointError, DataError
from pipekit.training.context import TrialContext
from pipekit.training.trial import Trial, evaluates_whole, has_evaluation


class Feed:
    """Iterator of a replica's micro-batches that counts them and their samples.

    Attributes:
        num_read: micro-batches read so far.
        num_samples: samples of those read since it was set to 0.
    """

    def __init__(self, micro_batches: Iterator[Any], length_of: Callable[[Any], int], num_read: int = 0) -> None:
        self._micro_batches = micro_batches
        self._length_of = length_of
        self.num_read = num_read
        self.num_samples = 0

    def __iter__(self) -> Feed:
        return self

    def __next__(self) -> Any:
        batch = next(self._micro_batches)
        self.num_read += 1
        self.num_samples += self._length_of(batch)
        return batch


class ValidationFeed(Feed):
    """Feed of validation data, which can yield its last micro-batch again."""

    def __init__(self, micro_batches: Iterator[Any], length_of: Callable[[Any], int]) -> None:
        super().__init__(micro_batches, length_of)
        self._last: Any = None

    def __next__(self) -> Any:
        self._last = super().__next__()
        return self._last

    def again(self) -> Iterator[Any]:
        """Yield the last micro-batch endlessly."""
        return repeat(self._last)


@dataclass(frozen=True)
class _Lengths:
    """Lengths of the data, as a rank that reads them knows them.

    Attributes:
        epoch: micro-batches of an epoch, those of all replicas; None where it is not known.
        validation: micro-batches of each replica's share of the validation data.
    """

    epoch: int | None
    validation: int


class TrialData:
    """The loaders of a trial on one rank. All ranks make one together.

    Args:
        trial: the trial.
        context: its context, with its engines.

    Attributes:
        epoch_micro_batches: micro-batches of an epoch, those of all replicas; None where it is not known.
        num_evaluations: calls of `evaluate_batch` that each rank makes.
        own_evaluations: those for which this rank has data of its own.

    Raises:
        DataError: on every rank, if a loader is of another kind, or has no length where one is needed.
    """

    def __init__(self, trial: Trial, context: TrialContext) -> None:
        self._trial, self._context = trial, context
        self._training = self._validation = None
        self.num_evaluations = self.own_evaluations = 0
        error: Exception | None = None
        mine: _Lengths | None = None
        reads = context.role.should_build_data_loader
        try:
            if reads:
                if type(trial).build_training_data_loader is not Trial.build_training_data_loader:
                    self._training = self._build("build_training_data_loader")
                if has_evaluation(trial):
                    self._validation = self._build("build_validation_data_loader")
                mine = _Lengths(self._epoch_length(), self._share_of_validation())
        except Exception as failure:
            error = failure
        raise_together(error)
        known = [each for each in gather_objects(mine) if each is not None]
        self.epoch_micro_batches = known[0].epoch
        if has_evaluation(trial) and not evaluates_whole(trial):
            self._plan_evaluation([each.validation for each in known])
            self.own_evaluations = min(self.num_evaluations, mine.validation) if mine else self.num_evaluations

    def _build(self, method: str) -> Any:
        loader = getattr(self._trial, method)()
        if self._context.checks_loaders and not isinstance(loader, DataLoader):
            raise DataError(
                f"{type(self._trial).__name__}.{method} returned {_kind(loader)}, in whose order a resumed run "
                "cannot go on; return a pipekit.data.DataLoader, which takes the same arguments, or call "
                "context.disable_dataset_reproducibility_checks() and shard and shuffle it yourself"
            )
        if not hasattr(loader, "__iter__"):
            raise DataError(f"{type(self._trial).__name__}.{method} returned {_kind(loader)}; return a data loader")
        return loader

    def _epoch_length(self) -> int | None:
        length = None if self._training is None else _length(self._training)
        if length == 0:
            raise DataError(f"{type(self._trial).__name__}.build_training_data_loader: the loader has no batch")
        is_whole = isinstance(self._training, DataLoader)
        return length if length is None or is_whole else length * self._context.role.data_parallel_world_size

    def _share_of_validation(self) -> int:
        if self._validation is None or evaluates_whole(self._trial):
            return 0
        length = _length(self._validation)
        if length is None:
            raise DataError(
                f"{type(self._trial).__name__}.build_validation_data_loader: the data have no length, and each rank "
                "must make as many calls of evaluate_batch as the others; give the dataset a __len__"
            )
        if not isinstance(self._validation, DataLoader):
            return length
        role = self._context.role
        return -(-max(0, length - role.data_parallel_rank) // role.data_parallel_world_size)

    def _plan_evaluation(self, shares: list[int]) -> None:
        """Give every rank the same number of evaluations; those that run out of data before the others repeat some."""
        where = f"{type(self._trial).__name__}.build_validation_data_loader"
        if min(shares) == 0:
            raise DataError(f"{where}: a replica has no batch to evaluate; give more data, or a smaller batch_size")
        if self._context.use_pipeline_parallel:
            needed = self._context.num_micro_batches_per_slot
            self.num_evaluations = min(shares) // needed
            if self.num_evaluations == 0:
                raise DataError(
                    f"{where}: a replica has {min(shares)} micro-batches, and each call of evaluate_batch takes "
                    f"{needed} with a pipeline; give more data, or a smaller batch_size"
                )
        else:
            self.num_evaluations = max(shares)

    def training_feed(self, num_read: int) -> Feed | None:
        """Return the iterator of this rank's training data from a position on; None on ranks that read none."""
        if self._training is None:
            return None
        batches: Iterator[Any]
        if isinstance(self._training, DataLoader):
            batches = iter(self._shard(self._training, repeat=True, skip=num_read))
        else:
            batches = islice(_cycle(self._training), num_read, None)
        return Feed(batches, self._trial.get_batch_length, num_read)

    def validation_feed(self) -> ValidationFeed | None:
        """Return the iterator of this rank's share of the validation data; None on ranks that read none."""
        if self._validation is None:
            return None
        is_ours = isinstance(self._validation, DataLoader)
        loader = self._shard(self._validation, repeat=False, skip=0) if is_ours else self._validation
        return ValidationFeed(iter(loader), self._trial.get_batch_length)

    def whole_validation(self) -> Any:
        """Return a loader of the whole validation data; None on ranks that read none."""
        if not isinstance(self._validation, DataLoader):
            return self._validation
        return self._validation.get_data_loader(seed=self._context.config.seed)

    def _shard(self, loader: DataLoader, *, repeat: bool, skip: int) -> Any:
        role = self._context.role
        return loader.get_data_loader(
            repeat=repeat,
            skip=skip,
            num_replicas=role.data_parallel_world_size,
            rank=role.data_parallel_rank,
            seed=self._context.config.seed,
        )

    def total_read(self, feed: Feed | None) -> int:
        """Return the micro-batches that all replicas have read for training. All ranks call this together.

        Raises:
            CheckpointError: on every rank, if replicas have read different numbers, so that there is no position.
        """
        known: dict[int, int] = {}
        for rank, read in enumerate(gather_objects(None if feed is None else feed.num_read)):
            if read is not None:
                known.setdefault(read, rank)
        if len(known) > 1:
            (first, rank), (second, other), *_ = known.items()
            raise CheckpointError(
                f"rank {rank} has read {first} micro-batches and rank {other} has read {second}, so that a checkpoint "
                "has no position in the data; let train_batch take as many on every rank"
            )
        return next(iter(known), 0) * self._context.role.data_parallel_world_size

    def own_read(self, total: int) -> int:
        """Return the micro-batches that each replica has read, of those that all have.

        Raises:
            CheckpointError: if another number of replicas cannot go on there.
        """
        number = self._context.role.data_parallel_world_size
        if total % number:
            raise CheckpointError(
                f"the checkpoint stands after {total} micro-batches of data, which {number} replicas cannot have read "
                "in equal parts; go on with as many replicas as before"
            )
        return total // number


def _length(loader: Any) -> int | None:
    try:
        return len(loader)
    except TypeError:
        return None


def _cycle(loader: Any) -> Iterator[Any]:
    while True:
        yield from loader


def _kind(value: Any) -> str:
    return "None" if value is None else f"a {type(value).__module__}.{type(value).__name__}"
