"""Periods of training in batches, epochs, samples or tokens, which end exactly where they say."""

from __future__ import annotations

import math
from collections.abc import Container
from dataclasses import dataclass
from fractions import Fraction

from pipekit.errors import ConfigError


@dataclass(frozen=True)
class Pace:
    """Progress that one batch of training makes.

    Attributes:
        samples: samples of a batch, those of all replicas.
        epochs: the part of an epoch that a batch is; None where the length of an epoch is not known.
    """

    samples: int
    epochs: Fraction | None = None

    def epoch_of(self, batch: int) -> int:
        """Epoch in which the batch with this number begins; 0 where the length of an epoch is not known.

        Example:
            >>> [Pace(4, epochs=Fraction(2, 5)).epoch_of(batch) for batch in range(6)]
            [0, 0, 0, 1, 1, 2]
        """
        return _floor(batch, self.epochs) if self.epochs is not None else 0


@dataclass(frozen=True)
class Period:
    """Period of training: something is done after every `number` of a unit, or after those that a container holds.

    A period that ends within a batch ends with that batch. Use one of the subclasses.

    Args:
        number: how many, or a container of the moments, such as `{10, 100, 1000}`.

    Raises:
        ConfigError: if it is neither.
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
        """Number of the unit in one batch. A ConfigError where it is not known."""
        raise NotImplementedError

    def is_due(self, batch: int, pace: Pace) -> bool:
        """True if the period ends with the batch before the one with this number: after `batch` batches.

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
        """Number of batches in which so much is trained.

        Raises:
            ConfigError: if the period is a container of moments.

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
    """Period in global batches, each of which makes one update of the weights."""

    def units_of(self, pace: Pace) -> Fraction:
        return Fraction(1)


class Epoch(Period):
    """Period in epochs, each of which goes once through the training data."""

    def units_of(self, pace: Pace) -> Fraction:
        if pace.epochs is None:
            raise ConfigError(f"{self}: the training data have no length; give Batch, or a dataset with __len__")
        return pace.epochs


class Samples(Period):
    """Period in samples, those of all replicas."""

    def units_of(self, pace: Pace) -> Fraction:
        return Fraction(pace.samples)


@dataclass(frozen=True)
class Tokens(Period):
    """Period in tokens, of samples that have the same number each.

    Args:
        number: how many, or a container of the moments.
        per_sample: the tokens of a sample.
    """

    per_sample: int

    def units_of(self, pace: Pace) -> Fraction:
        return Fraction(pace.samples * self.per_sample)

    def __str__(self) -> str:
        return f"Tokens({self._shown()}, per_sample={self.per_sample})"


def _floor(batches: int, units: Fraction) -> int:
    """Whole units of so many batches; fractions are slow to multiply, and this is asked several times a batch."""
    return batches * units.numerator // units.denominator
