"""Periods against counting one unit after the other."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipekit.errors import ConfigError
from pipekit.training.periods import Batch, Epoch, Pace, Period, Samples, Tokens


@given(
    number=st.integers(1, 40),
    samples=st.integers(1, 30),
    epoch_length=st.integers(1, 50),
    in_batch=st.integers(1, 20),
    unit=st.sampled_from(["batch", "epoch", "samples", "tokens"]),
)
def test_a_period_ends_with_the_batch_in_which_its_last_unit_is_trained(
    number: int, samples: int, epoch_length: int, in_batch: int, unit: str
) -> None:
    pace = Pace(samples, Fraction(in_batch, epoch_length))
    periods: dict[str, Period] = {
        "batch": Batch(number),
        "epoch": Epoch(number),
        "samples": Samples(number),
        "tokens": Tokens(number, per_sample=3),
    }
    # Counted in the smallest part of which batches and periods are made.
    per_batch, per_period = {
        "batch": (1, number),
        "epoch": (in_batch, number * epoch_length),
        "samples": (samples, number),
        "tokens": (samples * 3, number),
    }[unit]
    counted = 0
    for batch in range(1, 40):
        ends = any((part + 1) % per_period == 0 for part in range(counted, counted + per_batch))
        counted += per_batch
        assert periods[unit].is_due(batch, pace) == ends
    length = periods[unit].in_batches(pace)
    assert length * per_batch >= per_period > (length - 1) * per_batch


def test_a_container_holds_the_moments() -> None:
    pace = Pace(samples=4, epochs=Fraction(2, 5))
    due = {
        str(period): [batch for batch in range(1, 11) if period.is_due(batch, pace)]
        for period in (Batch([1, 4, 9]), Samples({10, 11, 40}), Epoch(range(2, 4)))
    }
    assert list(due.values()) == [[1, 4, 9], [3, 10], [5, 8]]


@pytest.mark.parametrize("number", [0, -3, 1.5, True])
def test_a_number_that_never_comes_is_refused(number: Any) -> None:
    with pytest.raises(ConfigError, match=r"^Batch\(.*\): must be a whole number of at least 1, or a container"):
        Batch(number)


def test_what_is_not_known_is_one_error() -> None:
    with pytest.raises(ConfigError, match=r"^Epoch\(2\): the training data have no length; give Batch"):
        Epoch(2).is_due(1, Pace(samples=4))
    with pytest.raises(ConfigError, match=r"the length of a training is one number; for example Batch\(100\)$"):
        Batch([1, 2]).in_batches(Pace(samples=4))
