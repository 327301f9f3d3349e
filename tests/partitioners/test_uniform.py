"""Stages of equally many layers."""

from __future__ import annotations

from itertools import pairwise

import pytest

from pipekit.errors import LayoutError
from pipekit.partitioners import partition_uniform


@pytest.mark.parametrize("num_layers", range(1, 30))
def test_stages_differ_by_one_layer_at_most(num_layers: int) -> None:
    for num_stages in range(1, num_layers + 1):
        boundaries = partition_uniform(num_layers, num_stages)
        sizes = [end - start for start, end in pairwise(boundaries)]
        assert sum(sizes) == num_layers
        assert max(sizes) - min(sizes) <= 1
        assert sizes == sorted(sizes, reverse=True), "the earlier stages take the layers that are left over"


def test_fewer_layers_than_stages_is_refused() -> None:
    with pytest.raises(LayoutError, match=r"try parallel\.pp=2 or lower"):
        partition_uniform(2, 3)
