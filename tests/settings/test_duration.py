"""Durations are read as people write them, and nothing else is."""

from __future__ import annotations

import pytest

from pipekit.settings.duration import parse_duration


@pytest.mark.parametrize(
    ("text", "seconds"), [("90s", 90), ("15m", 900), ("1.5h", 5400), ("2d", 172_800), ("1d2h3m4s", 93_784)]
)
def test_units_are_added_up(text: str, seconds: float) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "15", "m", "15 m", "15m\n", "-15m", "1e3s", "15min", ".5h"])
def test_other_texts_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"must be a time of days, hours, minutes and seconds; for example 11h30m"):
        parse_duration(text)


def test_no_time_at_all_is_refused() -> None:
    with pytest.raises(ValueError, match="must be longer than nothing"):
        parse_duration("0h0.0s")
