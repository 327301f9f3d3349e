"""Numbers as tables and pages show them."""

from __future__ import annotations

import pytest

from pipekit.number_text import bytes_text, count_text, days_text, seconds_text


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        (count_text(999), "999"),
        (count_text(1_500), "1.5 k"),
        (count_text(131_072.0), "131.1 k"),
        (count_text(999_940), "999.9 k"),
        (count_text(999_960), "1.0 M"),
        (count_text(9_996_000), "10.0 M"),
        (count_text(10**12), "1.0 T"),
        (count_text(2 * 10**15), "2,000.0 T"),
        (bytes_text(0), "0 B"),
        (bytes_text(999), "999 B"),
        (bytes_text(1500), "1.5 kB"),
        (bytes_text(999.96e9), "1.0 TB"),
        (seconds_text(0), "0 s"),
        (seconds_text(0.0001), "100 µs"),
        (seconds_text(0.00099996), "1.00 ms"),
        (seconds_text(0.5), "500 ms"),
        (seconds_text(0.9994), "999 ms"),
        (seconds_text(0.9996), "1.00 s"),
        (seconds_text(9.996), "10.0 s"),
        (seconds_text(59.96), "60.0 s"),
        (seconds_text(99.96), "100 s"),
        (seconds_text(3600), "3,600 s"),
        (seconds_text(3.2e-9), "3.2e-09 s"),
        (days_text(1234.5), "1,234.5 days"),
        (days_text(1), "1.0 days"),
        (days_text(0.5), "12.0 hours"),
        (days_text(1 / 48), "1,800 s"),
    ],
)
def test_figures_are_short(said: str, expected: str) -> None:
    assert said == expected
