"""Order of the samples of a replica in DeepSpeed's pipeline engine: not shuffled, and from the beginning again."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import KW_ONLY, dataclass
from typing import Any

from pipekit.data.collate import Collate, MapDataset, read_micro_batch
from pipekit.errors import DataError


@dataclass(eq=False, repr=False)
class ReplicaLoader:
    """Loads the micro-batches of one replica as DeepSpeed's pipeline engine does for `training_data`.

    Replica `r` of `dp` has the samples `r, r + dp, r + 2 dp, ...` in the dataset's order, as many as every other: where
    `dp` does not divide their number, the last ones are the dataset's first. They are divided into micro-batches of
    `micro_batch_size`; the last of an epoch may be shorter, or is dropped. Then they begin anew.

    It takes the place of a `BatchLoader`: `iterate_step` yields the micro-batches of the step at a position.

    Args:
        dataset: map-style; its samples are pairs of inputs and labels.
        micro_batch_size: samples of a micro-batch.
        num_micro_batches: micro-batches of a step.
        dp_rank: this replica's index.
        dp: the number of replicas.
        drop_last: whether to drop a short last micro-batch of an epoch.
        collate: makes a micro-batch of a list of samples; by default stacks pairs of inputs and labels.

    Raises:
        DataError: if there is no whole micro-batch.

    Source: DeepSpeed, runtime/pipe/engine.py (`_build_data_iter`); torch, utils/data/distributed.py.

    Example:
        >>> loader = ReplicaLoader([0] * 5, micro_batch_size=2, num_micro_batches=2, dp_rank=1, dp=2)
        >>> [loader.indices(micro_batch) for micro_batch in range(3)]
        [[1, 3], [0], [1, 3]]
    """

    dataset: MapDataset
    _: KW_ONLY
    micro_batch_size: int
    num_micro_batches: int
    dp_rank: int
    dp: int
    drop_last: bool = False
    collate: Collate | None = None

    def __post_init__(self) -> None:
        self._num_samples = -(-len(self.dataset) // self.dp)
        if not len(self):
            raise DataError(
                f"training_data has {len(self.dataset)} samples for {self.dp} replicas, less than a micro-batch of "
                f"{self.micro_batch_size} each; give more data, or set dataloader_drop_last to false"
            )

    def __len__(self) -> int:
        """Number of micro-batches of an epoch."""
        whole, rest = divmod(self._num_samples, self.micro_batch_size)
        return whole + (rest > 0 and not self.drop_last)

    def indices(self, micro_batch: int) -> list[int]:
        """Return the samples of a micro-batch, counted from the beginning of the training."""
        first = micro_batch % len(self) * self.micro_batch_size
        own = range(first, min(first + self.micro_batch_size, self._num_samples))
        return [(self.dp_rank + each * self.dp) % len(self.dataset) for each in own]

    def iterate_step(self, position: int) -> Iterator[Any]:
        """The micro-batches of a step that begins after `position` micro-batches of this replica."""
        for micro_batch in range(position, position + self.num_micro_batches):
            yield read_micro_batch(self.dataset, self.indices(micro_batch), self.collate)
