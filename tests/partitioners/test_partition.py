"""Choosing a partitioner by its name."""

from __future__ import annotations

import pytest

from pipekit.errors import LayoutError
from pipekit.partitioners import LayerFacts, partition

TYPES = ["Embed", "Block", "Block", "Block", "Head"]
PARAMETERS = [100, 10, 10, 10, 100]


def counted() -> LayerFacts:
    return LayerFacts(TYPES, lambda: PARAMETERS)


def uncounted() -> LayerFacts:
    def count() -> list[int]:
        raise AssertionError("this strategy does not ask for parameters")

    return LayerFacts(TYPES, count)


def test_each_name_reaches_its_strategy() -> None:
    assert partition("parameters", counted(), 3) == [0, 1, 4, 5]
    assert partition("uniform", uncounted(), 3) == [0, 2, 4, 5]
    assert partition("type:block", uncounted(), 3) == [0, 2, 3, 5]
    assert partition("manual", uncounted(), 3, boundaries=(0, 3, 4, 5)) == [0, 3, 4, 5]


def test_manual_without_boundaries_is_refused() -> None:
    with pytest.raises(LayoutError, match=r"parallel\.boundaries=\[\] has 0 entries"):
        partition("manual", uncounted(), 3)


def test_an_unknown_name_is_refused_with_the_known_ones() -> None:
    with pytest.raises(
        LayoutError, match="use parameters, uniform, flops, profile, memory, type:<regex>, manual or one"
    ):
        partition("best", uncounted(), 3)
