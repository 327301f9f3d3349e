"""The micro-batches of one optimizer step for one data-parallel rank."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import KW_ONLY, dataclass
from typing import Any, Protocol

from torch.utils.data import default_collate

from pipekit.config.rules import near_multiples
from pipekit.data.order import SampleOrder
from pipekit.errors import ConfigError, DataError
from pipekit.settings.base import alternatives


class MapDataset(Protocol):
    """A map-style dataset: `len(dataset)`, and `dataset[index]` is `(inputs, labels)`."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


@dataclass(eq=False, repr=False)
class BatchLoader:
    """Loads each data-parallel rank's micro-batches of every global batch.

    The global batch of a step is the next `global_batch_size` positions of the order after
    `consumed_samples`. It is divided in order into micro-batches of `b = micro_batch_size` samples:
    micro-batch `g` holds the samples `[g*b, (g+1)*b)` of the batch, and rank `r` takes the `n` micro-batches
    `[r*n, (r+1)*n)`. So the batch itself depends neither on the layout nor on the micro-batch size, and the
    loader has no state to save but the number that it is given. Past the last sample of an epoch a batch goes
    on with the next epoch.

    Args:
        dataset: map-style; its samples are pairs `(inputs, labels)` that `torch.utils.data.default_collate` can stack.
        order: the sample at each position.
        global_batch_size: samples of one optimizer step, over all ranks.
        micro_batch_size: samples of one forward pass on one rank.
        dp_rank: this rank's index along the data axis.
        dp: the data-parallel degree.
        collate: makes a micro-batch of a list of samples; by default stacks pairs of inputs and labels.

    Raises:
        ConfigError: if `micro_batch_size * dp` does not divide `global_batch_size`, or `dp_rank` is not in `[0, dp)`.
        DataError: if the order is not for a dataset of this length.
    """

    dataset: MapDataset
    order: SampleOrder
    _: KW_ONLY
    global_batch_size: int
    micro_batch_size: int
    dp_rank: int = 0
    dp: int = 1
    collate: Callable[[list[Any]], Any] | None = None

    def __post_init__(self) -> None:
        batch, micro, dp = self.global_batch_size, self.micro_batch_size, self.dp
        if min(batch, micro, dp) < 1 or batch % (micro * dp) != 0:
            raise ConfigError(
                f"train.global_batch_size={batch} is not a multiple of train.micro_batch_size={micro} x dp={dp}; try "
                f"train.global_batch_size={alternatives(near_multiples(batch, max(1, micro * dp)))}"
            )
        if not 0 <= self.dp_rank < dp:
            raise ConfigError(f"dp_rank={self.dp_rank} is not in [0, dp={dp})")
        if self.order.num_samples != len(self.dataset):
            raise DataError(
                f"the sample order is for {self.order.num_samples} samples and the dataset has {len(self.dataset)}; "
                "make it with SampleOrder(len(dataset), ...)"
            )
        self.num_micro_batches = batch // (micro * dp)

    def step_batches(self, consumed_samples: int) -> list[Any]:
        """Return this rank's micro-batches of the step that starts after `consumed_samples` samples.

        The next step starts after `consumed_samples + global_batch_size`.

        Returns:
            `num_micro_batches` pairs of inputs `(b, ...)` and labels `(b, ...)`, with `b = micro_batch_size`; or what
            `collate` makes.

        Raises:
            DataError: if a sample is not a pair.
        """
        return list(self.iterate_step(consumed_samples))

    def iterate_step(self, consumed_samples: int) -> Iterator[Any]:
        """The micro-batches of `step_batches`, each yielded as soon as it is collated."""
        num_samples = self.num_micro_batches * self.micro_batch_size
        indices = self.order.indices(consumed_samples + self.dp_rank * num_samples, num_samples).tolist()
        for first in range(0, num_samples, self.micro_batch_size):
            yield self._collate(indices[first : first + self.micro_batch_size])

    def _collate(self, indices: list[int]) -> Any:
        samples = [self.dataset[index] for index in indices]
        if self.collate is not None:
            return self.collate(samples)
        for index, sample in zip(indices, samples, strict=True):
            is_sequence, kind = isinstance(sample, tuple | list), type(sample).__name__
            if not is_sequence or len(sample) != 2:
                shown = f"a {kind} of {len(sample)}" if is_sequence else f"one {kind}"
                raise DataError(
                    f"sample {index} of {type(self.dataset).__name__} is {shown}; return a pair (inputs, labels)"
                )
        try:
            inputs, labels = default_collate([tuple(sample) for sample in samples])
        except (TypeError, RuntimeError) as error:
            raise DataError(
                f"samples {indices} of {type(self.dataset).__name__} cannot be stacked ({error}); "
                "give all samples the same shape and type"
            ) from error
        return inputs, labels
