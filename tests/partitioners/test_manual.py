"""Stages as the user draws them."""

from __future__ import annotations

import pytest

from pipekit.errors import LayoutError
from pipekit.partitioners import partition_manually


def test_sound_boundaries_are_taken_as_they_are() -> None:
    assert partition_manually((0, 1, 7, 8), 8, 3) == [0, 1, 7, 8]


@pytest.mark.parametrize(
    ("boundaries", "fault"),
    [
        ([0, 8], "has 2 entries, and parallel.pp=3 needs 4"),
        ([0, 1, 2, 3, 8], "has 5 entries, and parallel.pp=3 needs 4"),
        ([], "has 0 entries, and parallel.pp=3 needs 4"),
        ([1, 2, 3, 8], "must start with 0 and end with 8, the number of layers"),
        ([0, 2, 3, 9], "must start with 0 and end with 8, the number of layers"),
        ([0, 3, 3, 8], "must grow from entry to entry, since a stage must not be empty"),
        ([0, 5, 3, 8], "must grow from entry to entry, since a stage must not be empty"),
        ([0, -1, 3, 8], "must grow from entry to entry, since a stage must not be empty"),
    ],
)
def test_others_are_refused_with_some_that_fit(boundaries: list[int], fault: str) -> None:
    with pytest.raises(LayoutError) as caught:
        partition_manually(boundaries, 8, 3)
    assert str(caught.value) == f"parallel.boundaries={boundaries} {fault}; try [0, 2, 5, 8]"


def test_where_nothing_fits_a_lower_degree_is_suggested() -> None:
    with pytest.raises(LayoutError, match=r"try parallel\.pp=2 or lower"):
        partition_manually([0, 1, 2, 3], 2, 3)
