"""Randomness of reading data: draws of datasets, samplers and collate functions, apart from those of the model."""

from __future__ import annotations

import random
from types import TracebackType
from typing import Any

import numpy as np
import torch

# Not all of numpy's stubs know that its generator can be changed.
_numpy_random: Any = np.random


class OwnRandomness:
    """Random states of torch (on the CPU), numpy and `random` that hold inside a `with` block, and outside as before.

    The first block begins with `seed`, each later one where the block before ended. The states are the process's: no
    other thread may draw meanwhile. Of numpy's normal numbers, which are made in pairs, a second one that has not been
    drawn yet is dropped at both ends of a block.

    Example:
        >>> own = OwnRandomness(seed=7)
        >>> with own:
        ...     first = random.random(), random.random()
        >>> again = OwnRandomness(seed=7)
        >>> with again:
        ...     one = random.random()
        >>> outside = random.random()
        >>> with again:
        ...     first == (one, random.random())
        True
    """

    def __init__(self, seed: int) -> None:
        self._seed: int | None = seed
        # Changing numpy's generator takes a hundredth of the time of copying its state.
        self._numpy_generator: Any = np.random.MT19937(0)
        self._inside: tuple[Any, ...] = ()
        self._outside: tuple[Any, ...] = ()

    def reseed(self, seed: int) -> OwnRandomness:
        """Let the next block begin with `seed`."""
        self._seed = seed
        return self

    def __enter__(self) -> None:
        self._outside = self._swap(self._inside, self._numpy_generator)
        if self._seed is not None:
            # torch.manual_seed would seed the GPUs, too.
            torch.default_generator.manual_seed(self._seed)
            np.random.seed(self._seed % 2**32)
            random.seed(self._seed)
            self._seed = None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._inside = self._swap(self._outside, self._outside[2])

    @staticmethod
    def _swap(states: tuple[Any, ...], numpy_generator: Any) -> tuple[Any, ...]:
        """Put random states in place, where there are any, and return those from before."""
        before = torch.get_rng_state(), random.getstate(), _numpy_random.get_bit_generator()
        if states:
            torch.set_rng_state(states[0])
            random.setstate(states[1])
        _numpy_random.set_bit_generator(numpy_generator)
        return before
