"""Collation: the samples of a micro-batch are read, and stacked."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from torch.utils.data import default_collate

from pipekit.errors import DataError


class MapDataset(Protocol):
    """A map-style dataset: `len(dataset)`, and `dataset[index]` is `(inputs, labels)`."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


Collate = Callable[[list[Any]], Any]
"""Makes a micro-batch of a list of samples."""


def read_micro_batch(dataset: MapDataset, indices: Sequence[int], collate: Collate | None = None) -> Any:
    """Return the samples of a dataset as one micro-batch: what `collate` makes of them, or stacked inputs and labels.

    Raises:
        DataError: if they are to be stacked, and one is not a pair, or they differ in shape.
    """
    samples = [dataset[index] for index in indices]
    if collate is not None:
        return collate(samples)
    name = type(dataset).__name__
    for index, sample in zip(indices, samples, strict=True):
        is_sequence, kind = isinstance(sample, tuple | list), type(sample).__name__
        if not is_sequence or len(sample) != 2:
            shown = f"a {kind} of {len(sample)}" if is_sequence else f"one {kind}"
            raise DataError(f"sample {index} of {name} is {shown}; return a pair (inputs, labels)")
    try:
        inputs, labels = default_collate([tuple(sample) for sample in samples])
    except (TypeError, RuntimeError) as error:
        raise DataError(
            f"samples {list(indices)} of {name} cannot be stacked ({error}); give all samples the same shape and type"
        ) from error
    return inputs, labels
