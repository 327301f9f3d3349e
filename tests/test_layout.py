"""Layout arithmetic, against the definition and against DeepSpeed's topology."""

from __future__ import annotations

from itertools import chain, combinations, product

import pytest

from pipekit.errors import LayoutError
from pipekit.layout import Axis, Coordinate, Layout, plan_layout

LAYOUTS = [Layout(*degrees) for degrees in product((1, 2, 3), (1, 2, 4), (1, 2, 3))]
AXES: tuple[Axis, ...] = ("pipe", "data", "tensor")
SUBSETS: list[tuple[Axis, ...]] = [axes for count in range(4) for axes in combinations(AXES, count)]

each_layout = pytest.mark.parametrize("layout", LAYOUTS, ids=str)


@each_layout
def test_ranks_count_the_grid_from_the_innermost_axis(layout: Layout) -> None:
    grid = product(range(layout.pp), range(layout.dp), range(layout.tp))
    for rank, (pipe, data, tensor) in enumerate(grid):
        assert layout.coordinate(rank) == Coordinate(pipe=pipe, data=data, tensor=tensor)
        assert layout.rank(pipe=pipe, data=data, tensor=tensor) == rank
    assert layout.world_size == rank + 1


@each_layout
@pytest.mark.parametrize("axes", SUBSETS, ids="-".join)
def test_groups_are_the_ranks_that_differ_along_their_axes_alone(layout: Layout, axes: tuple[Axis, ...]) -> None:
    groups = layout.groups(*axes)
    assert sorted(chain(*groups)) == list(range(layout.world_size)), "each rank is in one group"
    assert groups == sorted(map(sorted, groups))
    group_of = {rank: index for index, group in enumerate(groups) for rank in group}
    for one, two in combinations(range(layout.world_size), 2):
        here, there = layout.coordinate(one), layout.coordinate(two)
        together = all(getattr(here, axis) == getattr(there, axis) for axis in AXES if axis not in axes)
        assert (group_of[one] == group_of[two]) == together


@each_layout
def test_ranks_and_groups_are_those_of_deepspeed(layout: Layout) -> None:
    from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology

    theirs = PipeModelDataParallelTopology(num_pp=layout.pp, num_mp=layout.tp, num_dp=layout.dp)
    assert theirs.world_size() == layout.world_size
    for rank in range(layout.world_size):
        coordinate = layout.coordinate(rank)
        assert tuple(theirs.get_coord(rank)) == (coordinate.pipe, coordinate.data, coordinate.tensor)
    for ours, axis in (("pipe", "pipe"), ("data", "data"), ("tensor", "model")):
        if theirs.get_dim(axis) > 1:  # DeepSpeed lists no groups of one
            assert layout.groups(ours) == sorted(theirs.get_axis_comm_lists(axis))  # type: ignore[arg-type]


@pytest.mark.parametrize("rank", [-1, 4])
def test_a_rank_outside_is_refused(rank: int) -> None:
    with pytest.raises(LayoutError, match=f"rank {rank} is outside a layout of 4 ranks .pp=2 x dp=2 x tp=1."):
        Layout(2, 2, 1).coordinate(rank)


@pytest.mark.parametrize("place", [{"pipe": 2}, {"data": 2}, {"tensor": 1}, {"pipe": -1}])
def test_a_place_outside_is_refused(place: dict[str, int]) -> None:
    with pytest.raises(LayoutError, match="is outside the layout pp=2 x dp=2 x tp=1"):
        Layout(2, 2, 1).rank(**place)


@pytest.mark.parametrize("axis", ["pp", "dp", "tp"])
def test_a_degree_below_one_is_refused(axis: str) -> None:
    with pytest.raises(LayoutError, match=rf"parallel\.{axis}=0 must be at least 1"):
        Layout(**{axis: 0})


# Planning


@pytest.mark.parametrize(("pp", "tp", "world_size", "dp"), [(1, 1, 1, 1), (2, 1, 8, 4), (2, 2, 8, 2), (8, 1, 8, 1)])
def test_auto_fills_the_processes_that_were_started(pp: int, tp: int, world_size: int, dp: int) -> None:
    layout = plan_layout(pp=pp, tp=tp, dp="auto", world_size=world_size, num_devices=64)
    assert layout == Layout(pp=pp, dp=dp, tp=tp)
    assert layout.world_size == world_size


def test_auto_fills_the_devices_where_nothing_was_started() -> None:
    assert plan_layout(pp=2, tp=1, dp="auto", num_devices=8) == Layout(pp=2, dp=4, tp=1)
    assert plan_layout(pp=2, tp=1, dp="auto") == Layout(pp=2, dp=1, tp=1)


def test_a_degree_that_is_given_need_not_fill_the_devices() -> None:
    assert plan_layout(pp=2, tp=1, dp=3, num_devices=8) == Layout(pp=2, dp=3, tp=1)
    assert plan_layout(pp=2, tp=1, dp=3) == Layout(pp=2, dp=3, tp=1)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (
            {"pp": 6, "tp": 1, "dp": "auto", "world_size": 8},
            "parallel.pp=6 x parallel.tp=1 does not divide 8: 8 processes were started, and pp*tp*dp must "
            "equal that; "
            "try parallel.pp=1, 2, 4 or 8",
        ),
        (
            {"pp": 16, "tp": 2, "dp": "auto", "num_devices": 8},
            "parallel.pp=16 x parallel.tp=2 does not divide 8: 8 devices are present, and pp*tp*dp must "
            "equal that; "
            "try parallel.pp=1, 2 or 4",
        ),
        (
            {"pp": 2, "tp": 1, "dp": "auto", "world_size": 1},
            "parallel.pp=2 x parallel.tp=1 does not divide 1: 1 processes were started, and pp*tp*dp must "
            "equal that; "
            "try parallel.pp=1",
        ),
        (
            {"pp": 1, "tp": 3, "dp": "auto", "world_size": 8},
            "parallel.pp=1 x parallel.tp=3 does not divide 8: 8 processes were started, and pp*tp*dp must "
            "equal that; "
            "no parallel.pp fits parallel.tp=3; try parallel.tp=1",
        ),
        (
            {"pp": 2, "tp": 1, "dp": 2, "world_size": 8},
            "parallel.pp=2 x parallel.tp=1 x parallel.dp=2 is 4, but 8 processes were started: pp*tp*dp "
            "must equal "
            "that; start 4, or set parallel.dp=auto",
        ),
        (
            {"pp": 4, "tp": 1, "dp": 4, "num_devices": 8},
            "parallel.pp=4 x parallel.tp=1 x parallel.dp=4 needs 16 devices, and 8 are present; lower one "
            "of them, or "
            "run on the CPU with run.device=cpu",
        ),
    ],
)
def test_what_does_not_fit_is_refused_with_what_to_type(asked: dict[str, object], message: str) -> None:
    with pytest.raises(LayoutError) as caught:
        plan_layout(**asked)  # type: ignore[arg-type]
    assert str(caught.value) == message
