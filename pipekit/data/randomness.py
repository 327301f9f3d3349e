"""Randomness of reading data: draws of datasets, samplers and collate functions, apart from those of the model."""

from __future__ import annotations

import random
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch import Tensor

# Not all of numpy's stubs know that its generator can be changed.
_numpy_random: Any = np.random

# Of torch and `random` copies, of numpy the generator itself: changing it takes a hundredth of the time of copying it.
_States = tuple[Tensor, tuple[Any, ...], Any]


class OwnRandomness:
    """Random states of torch (on the CPU), numpy and `random` for `with` blocks, apart from those outside.

    The states are the process's: no other thread may draw meanwhile. Of numpy's normal numbers, which are made in
    pairs, a second one that has not been drawn yet is dropped at both ends of a block.

    Args:
        seed: of the first block; each later one begins where the block before ended. None where `reseed` gives every
            block its seed, which saves copying the states at the end of each.

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

    def __init__(self, seed: int | None = None) -> None:
        self._continues = seed is not None
        self._start: int | _States | None = seed
        self._numpy_generator: Any = np.random.MT19937(0)

    def reseed(self, seed: int) -> OwnRandomness:
        """Let the next block begin with `seed`."""
        self._start = seed
        return self

    def __enter__(self) -> None:
        self._outside = _get_states()
        if isinstance(self._start, tuple):
            _set_states(self._start)
            return
        assert self._start is not None, "a block without a seed"
        # torch.manual_seed would also seed the GPUs.
        torch.default_generator.manual_seed(self._start)
        random.seed(self._start)
        _numpy_random.set_bit_generator(self._numpy_generator)
        np.random.seed(self._start % 2**32)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._start = _get_states() if self._continues else None
        _set_states(self._outside)


def _get_states() -> _States:
    return torch.get_rng_state(), random.getstate(), _numpy_random.get_bit_generator()


def _set_states(states: _States) -> None:
    torch.set_rng_state(states[0])
    random.setstate(states[1])
    _numpy_random.set_bit_generator(states[2])
