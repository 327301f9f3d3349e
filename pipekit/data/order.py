"""Sample order: the sample at each position of a training run, computed without a table.

The position of a run in its data is one number, `consumed_samples`. It means the same under every layout and
batch size, so a run that goes on with other degrees of parallelism neither loses nor repeats a sample.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pipekit.errors import DataError
from pipekit.rng import fold_seed

_NUM_ROUNDS = 8


@dataclass(frozen=True)
class SampleOrder:
    """The order in which a run goes through its samples, an endless sequence of indices in `[0, num_samples)`.

    With `shuffle` every epoch is a permutation of its own, which depends on `seed` and the epoch alone; without, every
    epoch goes through the samples as they stand in the dataset.

    The permutation is a Feistel network on the pairs `(x // b, x % b)` of an `a x b` grid just large enough to hold all
    samples. The few cells that are no sample are skipped by cycle walking: the network is applied again until it gives
    a sample, and what remains is still a permutation. Memory is that of the positions asked for, at any number of
    samples.

    Raises:
        DataError: if there is no sample.

    Source: Black and Rogaway, Ciphers with Arbitrary Finite Domains, 2002 (generalized Feistel, cycle-walking); Salmon
        et al., Parallel Random Numbers: As Easy as 1, 2, 3, 2011, for keyed mixing as a source of randomness.

    Example:
        >>> sorted(SampleOrder(5, seed=0).indices(5, 5).tolist())
        [0, 1, 2, 3, 4]
        >>> SampleOrder(3, seed=0, shuffle=False).indices(1, 4).tolist()
        [1, 2, 0, 1]
    """

    num_samples: int
    seed: int
    shuffle: bool = True

    def __post_init__(self) -> None:
        if self.num_samples < 1:
            raise DataError(f"the dataset has {self.num_samples} samples and needs at least 1; give more data")

    def indices(self, start: int, count: int) -> npt.NDArray[np.int64]:
        """Return the samples `(count,)` at positions `start` to `start + count - 1` of the run."""
        epochs, samples = np.divmod(np.arange(start, start + count, dtype=np.int64), self.num_samples)
        if not self.shuffle:
            return samples
        keys = _mix(epochs.astype(np.uint64) + np.uint64(fold_seed(self.seed, "sample order")))
        values = samples.astype(np.uint64)
        walking = np.arange(count)
        while walking.size > 0:
            values[walking] = self._permute_grid(values[walking], keys[walking])
            walking = walking[values[walking] >= self.num_samples]
        return values.astype(np.int64)

    def _permute_grid(self, values: npt.NDArray[np.uint64], keys: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
        num_rows = math.isqrt(self.num_samples - 1) + 1
        num_columns = -(-self.num_samples // num_rows)
        rows, columns = np.divmod(values, np.uint64(num_columns))
        for round_number in range(0, _NUM_ROUNDS, 2):
            shift = _mix(columns ^ _mix(keys + np.uint64(round_number))) % np.uint64(num_rows)
            rows = (rows + shift) % np.uint64(num_rows)
            shift = _mix(rows ^ _mix(keys + np.uint64(round_number + 1))) % np.uint64(num_columns)
            columns = (columns + shift) % np.uint64(num_columns)
        permuted: npt.NDArray[np.uint64] = rows * np.uint64(num_columns) + columns
        return permuted


def _mix(values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """Return a 64-bit hash of each value.

    Source: Steele, Lea and Flood, Fast Splittable Pseudorandom Number Generators, 2014 (SplitMix64).
    """
    values = values + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: npt.NDArray[np.uint64] = values ^ (values >> np.uint64(31))
    return mixed
