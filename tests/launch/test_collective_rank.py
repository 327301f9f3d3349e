"""Measurements of messages, read from the output of ranks. Tests of `pipekit doctor` start such ranks."""

from __future__ import annotations

from pipekit.launch.collective_rank import read_speed


def test_the_measurement_is_found_among_other_lines() -> None:
    assert read_speed('a library says hello\ncollective speed: {"backend": "gloo"}\n') == {"backend": "gloo"}
    assert read_speed("Killed\n") is None
