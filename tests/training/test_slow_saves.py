"""Saves that take too much of a training's time, by a clock that only the test moves."""

from __future__ import annotations

import pytest

from pipekit.training.slow_saves import SlowSaves


def describe(train_s: float, save_s: float, *, write_s: float | None = None) -> str | None:
    """Warning about the second of two saves, each after so many seconds of training; None if there is none."""
    now = [0.0]
    saves = SlowSaves(lambda: now[0])
    for _ in range(2):
        now[0] += train_s
        saves.begin()
        now[0] += save_s
        times = saves.end()
    saves.write_s = save_s if write_s is None else write_s
    return saves.describe(*times, lambda: 2_400_000_000, remedy="save less often")


def test_a_save_that_takes_a_large_share_is_told_with_the_speed_of_the_disk() -> None:
    assert describe(60.0, 12.0) == (
        "training stood still for 12.0 of the last 72.0 s to save 2.4 GB (200 MB/s); save less often"
    )
    told = describe(60.0, 12.0, write_s=72.0)
    assert told is not None
    assert "2.4 GB (33 MB/s)" in told, "in the background it was written for longer than training stood still"


@pytest.mark.parametrize(("train_s", "save_s"), [(60.0, 6.0), (900.0, 80.0), (0.1, 2.9)])
def test_a_save_that_takes_a_small_share_or_is_short_is_not_told(train_s: float, save_s: float) -> None:
    assert describe(train_s, save_s) is None
