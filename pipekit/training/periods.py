"""Periods of training in exact numbers of batches, epochs, samples or tokens."""

from __future__ import annotations

import math
from collections.abc import Container
from dataclasses import dataclass
from fractions import Fraction

from pipekit.errors import ConfigError


@dataclass(frozen=True)
class Pace:
    """Samples and epochs per batch of training.

    Attributes:
        samples: samples in a batch, over all replicas.
        epochs: fraction of an epoch that one batch makes up; None if the length of an epoch is unknown.
    """

    samples: int
    epochs: Fraction | None = None

    def epoch_of(self, batch: int) -> int:
        """Epoch in which the batch with this number begins; 0 if the length of an epoch is unknown.

        Example:
            >>> [Pace(4, epochs=Fraction(2, 5)).epoch_of(batch) for batch in range(6)]
            [0, 0, 0, 1, 1, 2]
        """
        return _floor(batch, self.epochs) if self.epochs is not None else 0


@dataclass(frozen=True)
class Period:
    """Base class of periods: `Period(100)` ends after every 100 units, `Period({10, 50})` after units 10 and 50.

    A period that ends within a batch takes effect at the end of that batch. Use one of the subclasses.

    Args:
        number: number of units, or a container of the units after which to act, such as `{10, 100, 1000}`.

    Raises:
        ConfigError: if `number` is neither a positive whole number nor a container.
    """

    number: int | Container[int]

    def __post_init__(self) -> None:
        is_number = isinstance(self.number, int) and not isinstance(self.number, bool)
        if (is_number and self.number < 1) or not (is_number or isinstance(self.number, Container)):  # type: ignore[operator]
            raise ConfigError(
                f"{type(self).__name__}({self.number!r}): must be a whole number of at least 1, or a container of "
                f"such; for example {type(self).__name__}(100)"
            )

    def units_of(self, pace: Pace) -> Fraction:
        """Number of units in one batch. Raises a ConfigError if it is unknown."""
        raise NotImplementedError

    def is_due(self, batch: int, pace: Pace) -> bool:
        """True if a period ends with the last of the first `batch` batches.

        Example:
            >>> [batch for batch in range(1, 11) if Samples(10).is_due(batch, Pace(samples=4))]
            [3, 5, 8, 10]
            >>> [batch for batch in range(1, 11) if Batch({2, 9}).is_due(batch, Pace(samples=4))]
            [2, 9]
        """
        units = self.units_of(pace)
        before, now = _floor(batch - 1, units), _floor(batch, units)
        if isinstance(self.number, int):
            return now // self.number > before // self.number
        return any(moment in self.number for moment in range(before + 1, now + 1))

    def in_batches(self, pace: Pace) -> int:
        """Length of the period in batches, rounded up.

        Raises:
            ConfigError: if the period is a container.

        Example:
            >>> Epoch(3).in_batches(Pace(samples=4, epochs=Fraction(2, 5)))
            8
        """
        if not isinstance(self.number, int):
            raise ConfigError(f"{self}: the length of a training is one number; for example {type(self).__name__}(100)")
        return math.ceil(self.number / self.units_of(pace))

    def __str__(self) -> str:
        return f"{type(self).__name__}({self._shown()})"

    def _shown(self) -> str:
        # Containers of a user's own may show themselves in another way in every process.
        is_plain = isinstance(self.number, (int, list, tuple, range, set, frozenset))
        return str(self.number) if is_plain else type(self.number).__name__


class Batch(Period):
    """Period in global batches; each global batch is one update of the weights."""

    def units_of(self, pace: Pace) -> Fraction:
        return Fraction(1)


class Epoch(Period):
    """Period in epochs; each epoch is one pass over the training data."""

    def units_of(self, pace: Pace) -> Fraction:
        if pace.epochs is None:
            raise ConfigError(f"{self}: the training data have no length; give Batch, or a dataset with __len__")
        return pace.epochs


class Samples(Period):
    """Period in samples, counted over all replicas."""

    def units_of(self, pace: Pace) -> Fraction:
        return Fraction(pace.samples)


@dataclass(frozen=True)
class Tokens(Period):
    """Period in tokens, for samples of equal length.

    Args:
        number: number of tokens, or a container of the token counts after which to act.
        per_sample: number of tokens in a sample.
    """

    per_sample: int

    def units_of(self, pace: Pace) -> Fraction:
        return Fraction(pace.samples * self.per_sample)

    def __str__(self) -> str:
        return f"Tokens({self._shown()}, per_sample={self.per_sample})"


def _floor(batches: int, units: Fraction) -> int:
    """Whole units in a number of batches; without `Fraction`, which is slow, since this runs several times a batch."""
    return batches * units.numerator // units.denominator
