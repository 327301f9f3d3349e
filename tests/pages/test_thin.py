"""Thinning of curves."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipekit.pages.thin import thin, trend
from pipekit.plan.train_result import Series


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 400), st.integers(4, 60), st.integers(0, 2**32 - 1), st.booleans())
def test_extremes_ends_and_order_stay(length: int, most: int, seed: int, has_gaps: bool) -> None:
    random = np.random.default_rng(seed)
    values = random.normal(size=length)
    if has_gaps:
        values[random.integers(length, size=length // 3)] = np.nan
    steps = np.cumsum(random.integers(1, 5, size=length))
    thinned = thin(Series(steps, values), most)
    assert len(thinned) <= most + has_gaps * (most // 2)
    places = np.searchsorted(steps, thinned.steps)
    assert np.array_equal(thinned.steps, steps[places])
    assert np.array_equal(thinned.values, values[places], equal_nan=True)
    assert (np.diff(thinned.steps) > 0).all()
    assert (thinned.steps[0], thinned.steps[-1]) == (steps[0], steps[-1])
    if not np.isnan(values).all():
        assert np.nanmax(thinned.values) == np.nanmax(values)
        assert np.nanmin(thinned.values) == np.nanmin(values)
    assert np.isnan(thinned.values).any() == np.isnan(values).any()


def test_a_trend_has_the_mean_of_the_curve() -> None:
    values = np.random.default_rng(0).normal(size=1000)
    means = trend(Series(np.arange(1000), values), 100)
    assert len(means) == 100
    assert means.values == pytest.approx(values.reshape(100, 10).mean(axis=1))
    assert len(trend(Series(np.arange(3), np.full(3, np.nan)), 2)) == 0
