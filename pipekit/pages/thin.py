"""Thinning of long curves to the points that a screen can show, with every spike."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from pipekit.plan.train_result import Series


def thin(series: Series, most: int) -> Series:
    """Curve with at most `most` points, where it had more: the lowest and the highest of each of `most / 2` stretches.

    The first and the last point stay. In a stretch with a value that is nan, one nan stays as well, so that the curve
    has a gap there; it takes the place of nothing else.

    Args:
        series: steps and values `(N,)`.
        most: number of points, at least 4.

    Example:
        >>> values = np.array([1.0, 2.0, 9.0, 2.0, 1.0, 0.5, 1.0, 1.0])
        >>> thin(Series(np.arange(8), values), most=4).values.tolist()
        [1.0, 9.0, 0.5, 1.0]
    """
    if len(series) <= most:
        return series
    values = series.values
    kept = {0, len(values) - 1}
    # The two ends have places of their own.
    for places in np.array_split(np.arange(1, len(values) - 1), (most - 2) // 2):
        stretch = values[places]
        is_nan = np.isnan(stretch)
        if is_nan.all():
            kept.add(int(places[0]))
            continue
        kept |= {int(places[np.nanargmin(stretch)]), int(places[np.nanargmax(stretch)])}
        if is_nan.any():
            kept.add(int(places[is_nan.argmax()]))
    chosen = np.array(sorted(kept))
    return Series(series.steps[chosen], values[chosen])


def trend(series: Series, points: int) -> Series:
    """Means of a curve over `points` stretches of equal length, each at the middle of its stretch; nan is left out.

    Example:
        >>> steps, means = trend(Series(np.arange(4), np.array([1.0, 3.0, 5.0, np.nan])), points=2)
        >>> steps.tolist(), means.tolist()
        ([0, 2], [2.0, 5.0])
    """
    is_finite = np.isfinite(series.values)
    steps, values = series.steps[is_finite], series.values[is_finite]
    if not len(steps):
        return Series(steps, values)
    stretches = np.array_split(np.arange(len(steps)), min(points, len(steps)))
    middles = np.array([each[(len(each) - 1) // 2] for each in stretches])
    means: NDArray[np.float64] = np.add.reduceat(values, [each[0] for each in stretches])
    return Series(steps[middles], means / [len(each) for each in stretches])
