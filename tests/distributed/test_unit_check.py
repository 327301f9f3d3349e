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
from pipekit.distributed.unit_check import (
    UnitDescription,
    check_unit,
    describe_unit,
    expected_answers,
    find_unit_faults,
)
from pipekit.errors import LayoutError
from pipekit.layout import Axis, Coordinate, Layout

AXES: tuple[Axis, ...] = ("pipe", "data", "tensor")
ORDERS = list(permutations(AXES))
FOUR = Layout(pp=2, dp=2)


def describe(layout: Layout, placement: tuple[int, ...] | None = None) -> list[UnitDescription]:
    """Return what the units of a layout answer, without processes."""
    placement = placement or tuple(range(layout.pp))
    described = []
    for rank in range(layout.world_size):
        place = layout.coordinate(rank)
        groups: dict[Any, tuple[int, ...]] = {
            name: next(tuple(ranks) for ranks in layout.groups(*axes) if rank in ranks)
            for name, axes in {**{axis: (axis,) for axis in AXES}, "model": ("pipe", "tensor")}.items()
        }
        plain = UnitDescription(
            rank=rank,
            layout=layout,
            placement=placement,
            coordinate=place,
            groups=groups,
            data_parallel_rank=place.data,
            data_parallel_world_size=layout.dp,
            should_build_data_loader=place.pipe in (placement[0], placement[-1]),
            should_report_metrics=rank == 0,
            answers={},
        )
        described.append(replace(plain, answers=expected_answers(plain)))
    return described


def changed(rank: int, *, layout: Layout = FOUR, **changes: Any) -> list[UnitDescription]:
    """Return the descriptions of a layout, of which one rank answers otherwise; `pipe=...` and so on change groups."""
    described = describe(layout)
    one = described[rank]
    groups = {name: changes.pop(name, ranks) for name, ranks in one.groups.items()}
    answers = {**one.answers, **changes.pop("answers", {})}
    described[rank] = replace(one, groups=groups, answers=answers, **changes)
    return described


@pytest.mark.parametrize("order", ORDERS, ids="-".join)
@pytest.mark.parametrize("degrees", [(1, 1, 1), (2, 2, 1), (2, 2, 2), (3, 2, 2), (1, 4, 1)], ids=str)
def test_the_units_of_every_layout_fit_together(degrees: tuple[int, int, int], order: Any) -> None:
    assert find_unit_faults(describe(Layout(*degrees, order=order))) == []


def test_other_placements_and_more_loaders_fit_too() -> None:
    assert find_unit_faults(describe(Layout(pp=2, dp=2), (0, 1, 1, 0))) == []
    described = describe(Layout(pp=4))
    described[1] = replace(described[1], should_build_data_loader=True)
    assert find_unit_faults(described) == []


def test_metrics_may_be_reported_by_any_one_rank() -> None:
    described = [replace(each, should_report_metrics=each.rank == 3) for each in describe(FOUR)]
    assert find_unit_faults(described) == []


def test_replicas_may_be_counted_in_another_order() -> None:
    described = []
    for each in describe(FOUR):
        turned = replace(each, data_parallel_rank=1 - each.data_parallel_rank)
        described.append(replace(turned, answers=expected_answers(turned)))
    assert find_unit_faults(described) == []


FAULTS: dict[str, tuple[list[UnitDescription], list[str]]] = {
    "members disagree": (
        changed(2, data=(2, 1)),
        ["rank 2: data.ranks is [2, 1], and rank 1, which is in it, says [0, 1]; return [2, 3]"],
    ),
    "twice": (changed(1, pipe=(1, 1, 3)), ["rank 1: pipe.ranks is [1, 1, 3], which names a rank twice; return [1, 3]"]),
    "not in its own group": (
        changed(3, pipe=(0, 2)),
        ["rank 3: pipe.ranks is [0, 2], which lacks rank 3 itself; return [1, 3]"],
    ),
    "missing from all": (
        [replace(each, groups={**each.groups, "data": (0, 1)}) for each in describe(Layout(dp=3))],
        [
            "rank 0: data.ranks is [0, 1], which is not the data group that it has",
            "rank 2: data.ranks is [0, 1], which lacks rank 2 itself, as do those of all other ranks; return [0, 1, 2]",
        ],
    ),
    "outside": (
        changed(0, model=(0, 7)),
        ["rank 0: model.ranks is [0, 7], and there is no rank 7 among the 4; return [0, 2]"],
    ),
    "another grid": (
        [replace(each, groups={**each.groups, "data": each.groups["pipe"]}) for each in describe(FOUR)],
        ["rank 0: data.ranks is [0, 2], which is not the data group that it has under pp=2", "tp=1; return [0, 1]"],
    ),
    "order of a pipeline": (
        [replace(each, groups={**each.groups, "pipe": each.groups["pipe"][::-1]}) for each in describe(FOUR)],
        ["rank 0: pipe.ranks is [2, 0], which is not the pipe group", "return [0, 2]"],
    ),
    "world size": (
        changed(1, data_parallel_world_size=4),
        ["rank 1: data_parallel_world_size is 4, and its data group is [0, 1]; return 2"],
    ),
    "world": (
        describe(FOUR)[:3],
        ["rank 0: layout is pp=2 x dp=2 x tp=1, which is 4 ranks, and there are 3: return a layout whose"],
    ),
    "replicas": (
        changed(1, data_parallel_rank=0),
        ["rank 1: data_parallel_rank is 0, and in its data group [0, 1] they are [0, 0]", "from 0 to 1; return 1"],
    ),
    "replicas of a pipeline": (
        [
            replace(each, data_parallel_rank=each.data_parallel_rank ^ (each.coordinate.pipe == 1))
            for each in describe(FOUR)
        ],
        ["rank 2: data_parallel_rank is 1, and on rank 0, which holds another part of the same replica", "return 0 on"],
    ),
    "first stage without data": (
        changed(1, should_build_data_loader=False),
        ["rank 1: should_build_data_loader is False, and the rank holds the first stage, which reads the inputs"],
    ),
    "last stage without data": (
        changed(3, should_build_data_loader=False),
        ["rank 3: should_build_data_loader is False, and the rank holds the last stage, which reads the labels"],
    ),
    "no metrics": (
        changed(0, should_report_metrics=False),
        ["rank 0: should_report_metrics is False, as on every rank", "return True"],
    ),
    "metrics twice": (
        changed(2, should_report_metrics=True),
        ["rank 2: should_report_metrics is True, as on rank 0, and both would", "return False on all but one"],
    ),
    "placement": (
        changed(1, placement=(1, 0)),
        ["rank 1: placement is (1, 0), and on rank 0 (0, 1); make both the same"],
    ),
    "a rank without a stage": (
        describe(FOUR, (0, 0)),
        ["rank 0: placement is (0, 0): it must name every pipeline rank from 0 to 1, and no other; return (0, 1)"],
    ),
    "layout": (
        changed(3, layout=FOUR, answers={}) and [*describe(FOUR)[:3], replace(describe(FOUR)[3], layout=Layout(pp=4))],
        ["rank 3: layout is pp=4 x dp=1 x tp=1, and on rank 0 pp=2 x dp=2 x tp=1; make both the same"],
    ),
    "coordinate": (
        changed(1, coordinate=Coordinate(pipe=1, data=0, tensor=0)),
        ["rank 1: coordinate is Coordinate(pipe=1, data=0, tensor=0), and under pp=2 x dp=2 x tp=1 the rank stands at"],
    ),
    "deepspeed's ranks": (
        changed(2, answers={"get_data_parallel_group_ranks": (0, 1)}),
        ["rank 2: get_data_parallel_group_ranks is (0, 1), and by the unit's groups, coordinate and placement (2, 3)"],
    ),
    "deepspeed's group": (
        changed(2, answers={"get_slice_parallel_group": (0, 1, 2, 3)}),
        ["rank 2: get_slice_parallel_group is (0, 1, 2, 3), and by the unit's groups, coordinate and placement (2,)"],
    ),
    "deepspeed's size": (
        changed(2, answers={"get_model_parallel_world_size": 1}),
        ["rank 2: get_model_parallel_world_size is 1, and by the unit's groups, coordinate and placement 2"],
    ),
    "stages": (
        changed(3, answers={"stages": (0,)}),
        ["rank 3: stages is (0,), and by the unit's groups, coordinate and placement (1,); return that"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_names_the_rank_the_method_and_what_to_return(name: str) -> None:
    described, expected = FAULTS[name]
    found = "\n".join(find_unit_faults(described))
    for text in expected:
        assert text in found


@pytest.mark.parametrize("name", expected_answers(describe(FOUR)[0]))
def test_every_answer_is_compared(name: str) -> None:
    (fault,) = find_unit_faults(changed(1, answers={name: -7}))
    assert fault.startswith(f"rank 1: {name} is -7, and by the unit's groups")


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


class Wide(ModelParallelUnit):
    """Hands DeepSpeed a group that is none of its own."""

    def get_data_parallel_group(self) -> Any:
        return self.model.process_group


class FailingOnOne(ModelParallelUnit):
    def get_slice_parallel_rank(self) -> int:
        if self.global_rank == 2:
            raise KeyError("nowhere")
        return super().get_slice_parallel_rank()


class Method(ModelParallelUnit):
    def should_report_metrics(self) -> bool:  # type: ignore[override]
        return self.global_rank == 0


class Vague(ModelParallelUnit):
    @property
    def data_parallel_rank(self) -> int:
        return None  # type: ignore[return-value]


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
    TwoReporters: "rank 2: should_report_metrics is True, as on rank 0, and both would write the same files",
    Loaderless: "rank 2: should_build_data_loader is False, and the rank holds the last stage",
    Crossed: "rank 0: data.ranks is [0, 2], which is not the data group that it has",
    Wide: "rank 0: get_data_parallel_group is (0, 2), and by the unit's groups, coordinate and placement (0, 1)",
    FailingOnOne: "rank 2: FailingOnOne.get_slice_parallel_rank raised KeyError: 'nowhere'; let it answer on every",
    Method: "rank 0: Method.should_report_metrics is a method, and is read without being called; put @property",
    Vague: "rank 0: Vague.data_parallel_rank is None; return what ModelParallelUnit.data_parallel_rank returns, of",
    Stranger: "rank 0: the unit is of the type Stranger; give a pipekit.ModelParallelUnit, or a subclass of it",
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
    assert messages[0].startswith("the ranks' model-parallel units do not fit together:\n  rank ")
    assert REFUSED[kind] in messages[0]


def refused_for_the_run(rank: int) -> list[str]:
    messages = []
    for options in ({"layout": Layout(pp=4)}, {"layout": FOUR, "placement": (1, 0)}):
        with pytest.raises(LayoutError) as caught:
            check_unit(ModelParallelUnit(FOUR), **options)  # type: ignore[arg-type]
        messages.append(str(caught.value))
    check_unit(ModelParallelUnit(FOUR), layout=Layout(pp=2, dp=2, order=("data", "pipe", "tensor")), placement=[0, 1])
    return messages


@pytest.mark.distributed
def test_a_unit_of_another_layout_than_the_run_is_refused(gloo: GlooWorkers) -> None:
    (degrees, placement), *others = gloo.run(4, refused_for_the_run)
    assert others == [[degrees, placement]] * 3
    assert re.search("rank 0: layout is pp=2 x dp=2 x tp=1, and that of the run is pp=4", degrees)
    assert re.search(r"rank 0: placement is \(0, 1\), and that of the run is \(1, 0\)", placement)


def describe_here(rank: int, layout: Layout, placement: tuple[int, ...]) -> UnitDescription:
    return describe_unit(ModelParallelUnit(layout, placement=placement))


@pytest.mark.distributed
@pytest.mark.parametrize("order", ORDERS, ids="-".join)
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
