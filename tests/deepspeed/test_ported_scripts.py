"""DeepSpeed's topologies as layouts."""

from __future__ import annotations

from itertools import permutations

import pytest
from deepspeed.runtime.pipe.topology import (
    PipeDataParallelTopology,
    PipeModelDataParallelTopology,
    ProcessTopology,
)

from pipekit.deepspeed.ported_scripts import _plan_layout
from pipekit.errors import LayoutError
from pipekit.layout import DEFAULT_ORDER, Layout

NAMES = {"pipe": "pipe", "data": "data", "model": "tensor"}


@pytest.mark.parametrize("axes", [axes for count in (1, 2, 3) for axes in permutations(NAMES, count)], ids="-".join)
@pytest.mark.parametrize("degrees", [(2, 3, 4), (1, 2, 2), (3, 1, 2)], ids=str)
def test_ranks_stand_where_the_topology_puts_them(axes: tuple[str, ...], degrees: tuple[int, ...]) -> None:
    topology = ProcessTopology(axes=list(axes), dims=list(degrees[: len(axes)]))
    layout = _plan_layout(None, topology, topology.world_size())
    assert layout.world_size == topology.world_size()
    for rank in range(layout.world_size):
        theirs = topology.get_coord(rank)._asdict()
        ours = layout.coordinate(rank)
        assert all(getattr(ours, NAMES[axis]) == index for axis, index in theirs.items())
    assert [axis for axis in layout.order if axis in [NAMES[axis] for axis in axes]] == [NAMES[axis] for axis in axes]


def test_deepspeeds_topologies_are_in_the_default_order() -> None:
    assert _plan_layout(None, PipeDataParallelTopology(num_pp=2, num_dp=3), 6) == Layout(pp=2, dp=3)
    both = PipeModelDataParallelTopology(num_pp=2, num_mp=2, num_dp=3)
    assert _plan_layout(None, both, 12) == Layout(pp=2, dp=3, tp=2, order=DEFAULT_ORDER)


def test_axes_that_are_missing_do_not_change_the_order() -> None:
    assert _plan_layout(None, ProcessTopology(axes=["data"], dims=[4]), 4) == Layout(dp=4)
    assert _plan_layout(None, ProcessTopology(axes=["pipe", "model"], dims=[2, 2]), 4) == Layout(pp=2, tp=2)


@pytest.mark.parametrize("degree", [1, 2])
def test_other_axes_are_refused_whatever_their_degree(degree: int) -> None:
    topology = ProcessTopology(axes=["pipe", "expert", "data"], dims=[2, degree, 1])
    with pytest.raises(LayoutError, match="the axis 'expert', and pipekit knows pipe, data and model, in any order"):
        _plan_layout(None, topology, topology.world_size())


def test_a_topology_of_another_world_is_refused() -> None:
    with pytest.raises(LayoutError, match="is 8, but 4 processes were started"):
        _plan_layout(None, PipeModelDataParallelTopology(num_pp=2, num_mp=2, num_dp=2), 4)
