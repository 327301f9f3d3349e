"""Layout arithmetic, against the definition and against DeepSpeed's topology."""

from __future__ import annotations

from itertools import chain, combinations, permutations, product

import pytest

from pipekit.errors import LayoutError
from pipekit.layout import DEFAULT_ORDER, Axis, Coordinate, Layout, Order, plan_layout

AXES: tuple[Axis, ...] = ("pipe", "data", "tensor")
ORDERS: list[Order] = [(one, two, three) for one, two, three in permutations(AXES)]
LAYOUTS = [Layout(*degrees, order=order) for degrees in product((1, 3), (1, 2, 4), (1, 2)) for order in ORDERS]
SUBSETS: list[tuple[Axis, ...]] = [axes for count in range(4) for axes in combinations(AXES, count)]

each_layout = pytest.mark.parametrize("layout", LAYOUTS, ids=str)


@each_layout
def test_ranks_count_the_grid_from_the_innermost_axis(layout: Layout) -> None:
    degrees = {"pipe": layout.pp, "data": layout.dp, "tensor": layout.tp}
    grid = product(*(range(degrees[axis]) for axis in layout.order))
    for rank, indices in enumerate(grid):
        place = dict(zip(layout.order, indices, strict=True))
        assert layout.coordinate(rank) == Coordinate(**place)
        assert layout.rank(**place) == rank
    assert layout.world_size == rank + 1


def test_tensor_is_innermost_and_pipe_outermost_unless_given() -> None:
    assert Layout(2, 2, 2) == Layout(2, 2, 2, ("pipe", "data", "tensor"))
    assert DEFAULT_ORDER == ("pipe", "data", "tensor")
    assert Layout(2, 2, 2).groups("tensor") == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert Layout(2, 2, 2, ("tensor", "pipe", "data")).groups("tensor") == [[0, 4], [1, 5], [2, 6], [3, 7]]


@each_layout
def test_groups_are_the_ranks_that_differ_along_their_axes_alone(layout: Layout) -> None:
    for axes in SUBSETS:
        groups = layout.groups(*axes)
        assert sorted(chain(*groups)) == list(range(layout.world_size)), "each rank is in one group"
        assert groups == sorted(map(sorted, groups))
        group_of = {rank: index for index, group in enumerate(groups) for rank in group}
        for one, two in combinations(range(layout.world_size), 2):
            here, there = layout.coordinate(one), layout.coordinate(two)
            together = all(getattr(here, axis) == getattr(there, axis) for axis in AXES if axis not in axes)
            assert (group_of[one] == group_of[two]) == together, axes


@each_layout
def test_groups_count_along_their_axes_from_0(layout: Layout) -> None:
    for axis in AXES:
        for ranks in layout.groups(axis):
            assert [getattr(layout.coordinate(rank), axis) for rank in ranks] == list(range(layout.degree(axis)))
    for axes in SUBSETS:
        for first, *_ in layout.groups(*axes):
            assert all(getattr(layout.coordinate(first), axis) == 0 for axis in axes)


@each_layout
def test_the_span_of_an_axis_holds_whole_groups(layout: Layout) -> None:
    for axis in AXES:
        span = layout.span(axis)
        assert layout.world_size % span == 0
        assert all(len({rank // span for rank in ranks}) == 1 for ranks in layout.groups(axis))
        if layout.degree(axis) > 1:
            assert max(ranks[-1] - ranks[0] for ranks in layout.groups(axis)) == span - span // layout.degree(axis)


@each_layout
def test_ranks_and_groups_are_those_of_deepspeed(layout: Layout) -> None:
    from deepspeed.runtime.pipe.topology import ProcessTopology

    names: dict[Axis, str] = {"pipe": "pipe", "data": "data", "tensor": "model"}
    axes = [names[axis] for axis in layout.order]
    theirs = ProcessTopology(axes=axes, dims=[layout.degree(axis) for axis in layout.order])
    assert theirs.world_size() == layout.world_size
    for rank in range(layout.world_size):
        coordinate, their_coordinate = layout.coordinate(rank), theirs.get_coord(rank)
        assert all(getattr(coordinate, ours) == getattr(their_coordinate, name) for ours, name in names.items())
    for ours, name in names.items():
        assert layout.groups(ours) == sorted(theirs.get_axis_comm_lists(name))


def test_deepspeeds_own_topology_is_the_default_order() -> None:
    from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology

    theirs = PipeModelDataParallelTopology(num_pp=2, num_mp=4, num_dp=3)
    for ours, name in (("pipe", "pipe"), ("data", "data"), ("tensor", "model")):
        assert Layout(pp=2, dp=3, tp=4).groups(ours) == sorted(theirs.get_axis_comm_lists(name))  # type: ignore[arg-type]


def test_a_layout_names_its_order_where_it_is_not_the_default() -> None:
    assert str(Layout(2, 2, 1)) == "pp=2 x dp=2 x tp=1"
    assert str(Layout(2, 2, 1, ("data", "pipe", "tensor"))) == "pp=2 x dp=2 x tp=1 in the order data, pipe, tensor"


@pytest.mark.parametrize("order", [(), ("pipe", "data"), ("pipe", "data", "data"), ("pipe", "data", "model"), "pdt"])
def test_an_order_of_other_axes_is_refused(order: object) -> None:
    with pytest.raises(LayoutError, match=r"once each, .* for example parallel\.order=\[pipe, data, tensor\]"):
        Layout(order=order)  # type: ignore[arg-type]


def test_an_order_may_be_given_as_a_list() -> None:
    listed = Layout(2, 2, 2, order=["data", "tensor", "pipe"])  # type: ignore[arg-type]
    assert {listed: 1}[Layout(2, 2, 2, order=("data", "tensor", "pipe"))] == 1


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


@pytest.mark.parametrize(
    "asked",
    [
        {"dp": "auto", "world_size": 8},
        {"dp": "auto", "num_devices": 8},
        {"dp": "auto"},
        {"dp": 2, "world_size": 8},
        {"dp": 2},
    ],
)
def test_the_order_is_kept_however_the_degrees_are_found(asked: dict[str, object]) -> None:
    layout = plan_layout(pp=2, tp=2, order=("tensor", "data", "pipe"), **asked)  # type: ignore[arg-type]
    assert layout.order == ("tensor", "data", "pipe")


def test_a_degree_that_is_given_need_not_fill_the_devices() -> None:
    assert plan_layout(pp=2, tp=1, dp=3, num_devices=8) == Layout(pp=2, dp=3, tp=1)
    assert plan_layout(pp=2, tp=1, dp=3) == Layout(pp=2, dp=3, tp=1)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (
            {"pp": 6, "tp": 1, "dp": "auto", "world_size": 8},
            "parallel.pp=6 x parallel.tp=1 does not divide 8, the number of processes started, and pp*tp*dp must "
            "equal it; "
            "try parallel.pp=1, 2, 4 or 8",
        ),
        (
            {"pp": 16, "tp": 2, "dp": "auto", "num_devices": 8},
            "parallel.pp=16 x parallel.tp=2 does not divide 8, the number of GPUs present, and pp*tp*dp must "
            "equal it; "
            "try parallel.pp=1, 2 or 4, or run on the CPU with run.device=cpu",
        ),
        (
            {"pp": 2, "tp": 1, "dp": "auto", "world_size": 1},
            "parallel.pp=2 x parallel.tp=1 does not divide 1, the number of processes started, and pp*tp*dp must "
            "equal it; "
            "try parallel.pp=1",
        ),
        (
            {"pp": 1, "tp": 3, "dp": "auto", "world_size": 8},
            "parallel.pp=1 x parallel.tp=3 does not divide 8, the number of processes started, and pp*tp*dp must "
            "equal it; "
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
def test_degrees_that_do_not_fit_are_refused_with_a_remedy(asked: dict[str, object], message: str) -> None:
    with pytest.raises(LayoutError) as caught:
        plan_layout(**asked)  # type: ignore[arg-type]
    assert str(caught.value) == message
