"""Units that do not fit together are found out before training, on every rank; those that do are trained with."""

from __future__ import annotations

import re
from dataclasses import replace
from itertools import permutations
from typing import Any

import pytest

from engine_jobs import Case, build_engine, micro_batches, reference_run
from gloo_workers import GlooWorkers
from pipekit.distributed.mpu import ModelParallelUnit, RankGroup
from pipekit.distributed.mpu_check import MPUDescription, check_mpu, describe_mpu, find_mpu_faults
from pipekit.errors import LayoutError
from pipekit.layout import Axis, Coordinate, Layout

AXES: tuple[Axis, ...] = ("pipe", "data", "tensor")
ORDERS = list(permutations(AXES))
FOUR = Layout(pp=2, dp=2)


def describe(layout: Layout, placement: tuple[int, ...] | None = None) -> list[MPUDescription]:
    """Answers of the units of a layout, without processes."""
    placement = placement or tuple(range(layout.pp))
    described = []
    for rank in range(layout.world_size):
        place = layout.coordinate(rank)
        groups = {
            name: next(tuple(ranks) for ranks in layout.groups(*axes) if rank in ranks)
            for name, axes in {**{axis: (axis,) for axis in AXES}, "model": ("pipe", "tensor")}.items()
        }
        loads = place.pipe in (placement[0], placement[-1])
        described.append(MPUDescription(rank, layout, placement, place, groups, place.data, loads, rank == 0))
    return described


def changed(rank: int, **changes: Any) -> list[MPUDescription]:
    """Return the descriptions of four ranks, of which one answers otherwise; `pipe=...` and so on change groups."""
    described = describe(FOUR)
    groups = {name: changes.pop(name, ranks) for name, ranks in described[rank].groups.items()}
    described[rank] = replace(described[rank], groups=groups, **changes)
    return described


@pytest.mark.parametrize("order", ORDERS, ids="-".join)
@pytest.mark.parametrize("degrees", [(1, 1, 1), (2, 2, 1), (3, 2, 2)], ids=str)
def test_the_units_of_every_layout_fit_together(degrees: tuple[int, int, int], order: Any) -> None:
    assert find_mpu_faults(describe(Layout(*degrees, order=order))) == []


def test_what_a_unit_may_answer_otherwise() -> None:
    assert find_mpu_faults(describe(FOUR, (0, 1, 1, 0))) == []
    assert find_mpu_faults([replace(each, should_build_data_loader=True) for each in describe(Layout(pp=4))]) == []
    assert find_mpu_faults([replace(each, should_report_metrics=each.rank == 3) for each in describe(FOUR)]) == []
    turned = [replace(each, data_parallel_rank=1 - each.data_parallel_rank) for each in describe(FOUR)]
    assert find_mpu_faults(turned) == []


FAULTS: dict[str, tuple[list[MPUDescription], str]] = {
    "group": (changed(2, data=(2, 1)), "rank 2: data.ranks is [2, 1], and under pp=2 x dp=2 x tp=1 [2, 3]; return"),
    "world": (describe(FOUR)[:3], "rank 0: layout is pp=2 x dp=2 x tp=1, which is 4 ranks, and there are 3: return a"),
    "replicas": (changed(1, data_parallel_rank=0), "rank 1: data_parallel_rank is 0; it must differ within a data"),
    "replicas of a pipeline": (
        [replace(each, data_parallel_rank=each.data_parallel_rank ^ each.coordinate.pipe) for each in describe(FOUR)],
        "rank 2: data_parallel_rank is 1; it must differ within a data group, count from 0 to 1, and be one for all",
    ),
    "loader": (changed(3, should_build_data_loader=False), "rank 3: should_build_data_loader is False, and the rank"),
    "no metrics": (changed(0, should_report_metrics=False), "should_report_metrics is True on the ranks []; return"),
    "metrics": (changed(2, should_report_metrics=True), "should_report_metrics is True on the ranks [0, 2]; return"),
    "placement": (changed(1, placement=(1, 0)), "rank 1: placement is (1, 0), and on rank 0 (0, 1); make both the"),
    "stage": (describe(FOUR, (0, 0)), "rank 0: placement is (0, 0): it must name every pipeline rank from 0 to 1"),
    "layout": (changed(3, layout=Layout(pp=4)), "rank 3: layout is pp=4 x dp=1 x tp=1, and on rank 0 pp=2 x dp=2"),
    "coordinate": (changed(1, coordinate=Coordinate(1, 0, 0)), "rank 1: coordinate is Coordinate(pipe=1, data=0"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_names_the_rank_the_answer_and_the_right_one(name: str) -> None:
    described, expected = FAULTS[name]
    assert expected in "\n".join(find_mpu_faults(described))


# Units of one's own.


class TwoReporters(ModelParallelUnit):
    @property
    def should_report_metrics(self) -> bool:
        return self.data_parallel_rank == 0


class Loaderless(ModelParallelUnit):
    @property
    def should_build_data_loader(self) -> bool:
        return self.is_first_stage


class Crossed(ModelParallelUnit):
    """Averages the gradients of different stages."""

    def __init__(self, layout: Layout, **options: Any) -> None:
        super().__init__(layout, **options)
        self.data = self.pipe


class FailingOnOne(ModelParallelUnit):
    @property
    def data_parallel_rank(self) -> int:
        if self.global_rank == 2:
            raise KeyError("nowhere")
        return super().data_parallel_rank


class Stranger:
    pass


class ReportsLast(ModelParallelUnit):
    """The last rank writes the metrics, every rank has a loader, and replicas talk in a group of their own."""

    def __init__(self, layout: Layout, **options: Any) -> None:
        super().__init__(layout, **options)
        own = self.build_group(layout.groups("data"), purpose="mine")
        assert own is not None
        self.data = RankGroup(own.ranks, own.process_group)

    @property
    def should_report_metrics(self) -> bool:
        return self.global_rank == self.layout.world_size - 1

    @property
    def should_build_data_loader(self) -> bool:
        return True


REFUSED: dict[type, str] = {
    TwoReporters: "should_report_metrics is True on the ranks [0, 2]; return True on one rank",
    Loaderless: "rank 2: should_build_data_loader is False, and the rank holds the first stage",
    Crossed: "rank 0: data.ranks is [0, 2], and under pp=2 x dp=2 x tp=1 [0, 1]; return that",
    FailingOnOne: "rank 2: FailingOnOne raised KeyError: 'nowhere'; let it answer on every rank",
    Stranger: "rank 0: the mpu is of the type Stranger; give a pipekit.ModelParallelUnit, or a subclass of it",
}


def refused(rank: int, kind: type) -> str:
    unit = kind() if kind is Stranger else kind(FOUR)
    with pytest.raises(LayoutError) as caught:
        build_engine(Case(pp=2, dp=2), unit=unit)
    return str(caught.value)


@pytest.mark.distributed
@pytest.mark.parametrize("kind", REFUSED, ids=lambda kind: kind.__name__)
def test_units_that_do_not_fit_are_one_error_on_every_rank(gloo: GlooWorkers, kind: type) -> None:
    messages = gloo.run(4, refused, kind)
    assert len(set(messages)) == 1
    assert messages[0].startswith("the ranks' model-parallel units do not fit together:\n  ")
    assert REFUSED[kind] in messages[0]


def refused_for_the_run(rank: int) -> list[str]:
    messages = []
    for options in ({"layout": Layout(pp=4)}, {"layout": FOUR, "placement": (1, 0)}):
        with pytest.raises(LayoutError) as caught:
            check_mpu(ModelParallelUnit(FOUR), **options)  # type: ignore[arg-type]
        messages.append(str(caught.value))
    check_mpu(ModelParallelUnit(FOUR), layout=Layout(pp=2, dp=2, order=("data", "pipe", "tensor")), placement=[0, 1])
    return messages


@pytest.mark.distributed
def test_a_unit_of_another_layout_than_the_run_is_refused(gloo: GlooWorkers) -> None:
    (degrees, placement), *others = gloo.run(4, refused_for_the_run)
    assert others == [[degrees, placement]] * 3
    assert re.search("rank 0: layout is pp=2 x dp=2 x tp=1, and that of the run is pp=4", degrees)
    assert re.search(r"rank 0: placement is \(0, 1\), and that of the run is \(1, 0\)", placement)


def describe_here(rank: int, layout: Layout, placement: tuple[int, ...]) -> MPUDescription:
    return describe_mpu(ModelParallelUnit(layout, placement=placement))


@pytest.mark.distributed
@pytest.mark.parametrize(
    "order",
    [ORDERS[0], ORDERS[-1], *(pytest.param(each, marks=pytest.mark.slow) for each in ORDERS[1:-1])],
    ids="-".join,
)
def test_units_answer_what_is_expected_of_them(gloo: GlooWorkers, order: Any) -> None:
    for layout, placement in ((Layout(2, 2, 2, order), (0, 1, 1, 0)), (Layout(2, 2, 1, order), (0, 1))):
        assert gloo.run(layout.world_size, describe_here, layout, placement) == describe(layout, placement)


def train_with_own_unit(rank: int, case: Case, layout: Layout) -> tuple[list[float], bool]:
    engine = build_engine(case, unit=ReportsLast(layout))
    losses = [
        float(engine.train_batch(micro_batches(step, case, engine.mpu.data_parallel_rank)))
        for step in range(case.steps)
    ]
    return losses, engine.mpu.should_report_metrics


@pytest.mark.distributed
@pytest.mark.parametrize("zero", [0, 1])
@pytest.mark.parametrize("order", [("pipe", "data", "tensor"), ("data", "pipe", "tensor")], ids="-".join)
def test_a_unit_of_ones_own_trains_as_one_process_does(gloo: GlooWorkers, order: Any, zero: int) -> None:
    case = Case(pp=2, dp=2, zero=zero, steps=4)
    expected = reference_run(case)["losses"]
    for rank, (losses, reports) in enumerate(gloo.run(4, train_with_own_unit, case, Layout(2, 2, 1, order))):
        assert losses == pytest.approx(expected, rel=1e-4)
        assert reports == (rank == 3)
