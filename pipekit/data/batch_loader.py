"""The micro-batches of one optimizer step for one data-parallel rank."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import KW_ONLY, dataclass
from typing import Any

from pipekit.config.rules import near_multiples
from pipekit.data.collate import Collate, MapDataset, read_micro_batch
from pipekit.data.mixture import MixtureOrder
from pipekit.data.order import SampleOrder
from pipekit.errors import ConfigError, DataError
from pipekit.settings.base import alternatives


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
        batch_size_at: returns the samples of the step at a position, a multiple of `micro_batch_size * dp`; always
            `global_batch_size` unless given.

    Raises:
        ConfigError: if `micro_batch_size * dp` does not divide `global_batch_size`, or `dp_rank` is not in `[0, dp)`.
        DataError: if the order is not for a dataset of this length.
    """

    dataset: MapDataset
    order: SampleOrder | MixtureOrder
    _: KW_ONLY
    global_batch_size: int
    micro_batch_size: int
    dp_rank: int = 0
    dp: int = 1
    collate: Collate | None = None
    batch_size_at: Callable[[int], int] | None = None

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

    def end_of_step(self, consumed_samples: int) -> int:
        """The position after the step that starts after `consumed_samples` samples."""
        return consumed_samples + (
            self.global_batch_size if self.batch_size_at is None else self.batch_size_at(consumed_samples)
        )

    def num_micro_batches(self, consumed_samples: int) -> int:
        """This rank's micro-batches of the step that starts after `consumed_samples` samples."""
        size = self.end_of_step(consumed_samples) - consumed_samples
        return size // (self.micro_batch_size * self.dp)

    def step_batches(self, consumed_samples: int) -> list[Any]:
        """Return this rank's micro-batches of the step that starts after `consumed_samples` samples.

        The next step starts after `end_of_step(consumed_samples)`.

        Returns:
            `num_micro_batches` pairs of inputs `(b, ...)` and labels `(b, ...)`, with `b = micro_batch_size`; or what
            `collate` makes.

        Raises:
            DataError: if a sample is not a pair.
        """
        return list(self.iterate_step(consumed_samples))

    def iterate_step(self, consumed_samples: int) -> Iterator[Any]:
        """The micro-batches of `step_batches`, each yielded as soon as it is collated."""
        for indices in self.step_indices(consumed_samples):
            yield read_micro_batch(self.dataset, indices, self.collate)

    def step_indices(self, consumed_samples: int) -> list[list[int]]:
        """The samples of each micro-batch of `step_batches`."""
        num_samples = self.num_micro_batches(consumed_samples) * self.micro_batch_size
        indices = self.order.indices(consumed_samples + self.dp_rank * num_samples, num_samples).tolist()
        return [
            indices[first : first + self.micro_batch_size] for first in range(0, num_samples, self.micro_batch_size)
        ]
