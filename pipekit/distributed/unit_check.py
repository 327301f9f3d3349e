"""Check that the process groups of all ranks fit together: their answers are compared before training."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, Literal

import torch.distributed as dist

from pipekit.distributed.mpu import ModelParallelUnit
from pipekit.errors import LayoutError
from pipekit.layout import Axis, Coordinate, Layout

GroupName = Literal["pipe", "data", "tensor", "model"]

_AXES_OF: dict[GroupName, tuple[Axis, ...]] = {
    "pipe": ("pipe",),
    "data": ("data",),
    "tensor": ("tensor",),
    "model": ("pipe", "tensor"),
}

_TYPES: dict[str, type] = {
    "layout": Layout,
    "placement": tuple,
    "coordinate": Coordinate,
    "data_parallel_rank": int,
    "data_parallel_world_size": int,
    "should_build_data_loader": bool,
    "should_report_metrics": bool,
}

# An error that goes on for pages is not read.
_MOST_SHOWN = 6


@dataclass(frozen=True)
class UnitDescription:
    """Answers of a rank's unit, as plain data.

    Attributes:
        rank: the global rank, as torch.distributed knows it.
        layout: the unit's.
        placement: the pipeline rank of each stage.
        coordinate: where the unit says that the rank stands.
        groups: the rank lists of its groups, by name.
        data_parallel_rank: which replica it says to belong to.
        data_parallel_world_size: how many there are.
        should_build_data_loader: whether it reads batches.
        should_report_metrics: whether it writes metrics.
        answers: what it says beside, most of it under DeepSpeed's names; of a process group the ranks, sorted.
    """

    rank: int
    layout: Layout
    placement: tuple[int, ...]
    coordinate: Coordinate
    groups: Mapping[GroupName, tuple[int, ...]]
    data_parallel_rank: int
    data_parallel_world_size: int
    should_build_data_loader: bool
    should_report_metrics: bool
    answers: Mapping[str, Any]


def expected_answers(description: UnitDescription) -> dict[str, Any]:
    """Expected answers of a unit whose groups, coordinate and placement are right."""
    rank, pipe_rank, placement = description.rank, description.coordinate.pipe, description.placement
    pipe, data, tensor, model = (description.groups[name] for name in _AXES_OF)
    expected: dict[str, Any] = {
        "global_rank": rank,
        "get_global_rank": rank,
        "pipe_rank": pipe_rank,
        "stage_id": pipe_rank,
        "get_stage_id": pipe_rank,
        "num_stages": len(placement),
        "stages": tuple(stage for stage, holder in enumerate(placement) if holder == pipe_rank),
        "is_first_stage": placement[0] == pipe_rank,
        "is_last_stage": placement[-1] == pipe_rank,
        "pp_group": pipe,
        "pipe_parallel_size": len(pipe),
        "data_parallel_size": len(data),
        "model_parallel_size": len(tensor),
        "slice_parallel_size": len(tensor),
        "data_parallel_id": description.data_parallel_rank,
        "get_data_parallel_id": description.data_parallel_rank,
        "get_data_parallel_group_ranks": data,
    }
    # DeepSpeed's names, and Megatron's, which DeepSpeed prefers where they are there.
    names: dict[str, tuple[int, tuple[int, ...]]] = {
        "pipe_parallel": (pipe_rank, pipe),
        "pipeline_model_parallel": (pipe_rank, pipe),
        "data_parallel": (description.data_parallel_rank, data),
        "slice_parallel": (tensor.index(rank), tensor),
        "tensor_model_parallel": (tensor.index(rank), tensor),
        "model_parallel": (model.index(rank), model),
    }
    for name, (own, ranks) in names.items():
        expected[f"get_{name}_rank"] = own
        expected[f"get_{name}_world_size"] = len(ranks)
        expected[f"get_{name}_group"] = tuple(sorted(ranks))
    for group, ranks in description.groups.items():
        expected[f"{group}.process_group"] = tuple(sorted(ranks))
    for name, ranks in (("pipe", pipe), ("data", data), ("slice", tensor), ("tensor_model", tensor), ("model", model)):
        expected[f"get_{name}_parallel_src_rank"] = ranks[0]
    return expected


def describe_unit(unit: ModelParallelUnit) -> UnitDescription:
    """Answers of this rank's unit.

    Raises:
        LayoutError: if it does not answer, or is none.
    """
    rank = dist.get_rank()
    if not isinstance(unit, ModelParallelUnit):
        raise LayoutError(
            f"rank {rank}: the unit is of the type {type(unit).__name__}; give a pipekit.ModelParallelUnit, or a "
            "subclass of it"
        )
    plain = {name: _ask(unit, name, rank) for name in _TYPES}
    for name, kind in _TYPES.items():
        if not isinstance(plain[name], kind):
            raise LayoutError(
                f"rank {rank}: {type(unit).__name__}.{name} is {plain[name]}; return what ModelParallelUnit.{name} "
                f"returns, of the type {kind.__name__}"
            )
    groups: dict[GroupName, tuple[int, ...]] = {name: _ask(unit, f"{name}.ranks", rank) for name in _AXES_OF}
    description = UnitDescription(**{**plain, "rank": rank, "groups": groups, "answers": {}})
    # A group that lacks the rank itself is found out without them.
    if any(rank not in ranks for ranks in groups.values()):
        return description
    answers = {name: _ask(unit, name, rank) for name in expected_answers(description)}
    return UnitDescription(**{**vars(description), "answers": answers})


def _ask(unit: ModelParallelUnit, name: str, rank: int) -> Any:
    where = f"rank {rank}: {type(unit).__name__}.{name}"
    try:
        value = attrgetter(name)(unit)
        if name.startswith("get_"):
            value = value()
    except Exception as error:
        raise LayoutError(
            f"{where} raised {type(error).__name__}: {error}; let it answer on every rank, as "
            f"ModelParallelUnit.{name} does"
        ) from error
    if callable(value):
        raise LayoutError(f"{where} is a method, and is read without being called; put @property above it")
    if isinstance(value, dist.ProcessGroup):
        return tuple(sorted(dist.get_process_group_ranks(value)))
    if isinstance(value, (list, tuple)):
        return tuple(value)
    return value if isinstance(value, (bool, int, Layout, Coordinate)) else repr(value)


def find_unit_faults(descriptions: Sequence[UnitDescription]) -> list[str]:
    """Contradictions in the answers of all ranks: the rank, its answer, and the right one.

    Args:
        descriptions: of every rank, in order.
    """
    return (
        list(_differences(descriptions))
        or [fault for name in _AXES_OF for fault in _faults_of_groups(descriptions, name)]
        or list(_faults_of_ranks(descriptions))
    )


def _differences(descriptions: Sequence[UnitDescription]) -> Iterator[str]:
    first = descriptions[0]
    layout, placement, world_size = first.layout, first.placement, len(descriptions)
    for other in descriptions[1:]:
        if other.layout != layout:
            yield f"rank {other.rank}: layout is {other.layout}, and on rank 0 {layout}; make both the same"
        elif other.placement != placement:
            yield f"rank {other.rank}: placement is {other.placement}, and on rank 0 {placement}; make both the same"
    if layout.world_size != world_size:
        yield (
            f"rank 0: layout is {layout}, which is {layout.world_size} ranks, and there are {world_size}: return a "
            f"layout whose degrees multiply to {world_size}"
        )
    elif set(placement) != set(range(layout.pp)):
        yield (
            f"rank 0: placement is {placement}: it must name every pipeline rank from 0 to {layout.pp - 1}, and no "
            f"other; return {tuple(range(layout.pp))} for one stage on each"
        )
    else:
        for description in descriptions:
            where = layout.coordinate(description.rank)
            if description.coordinate != where:
                yield (
                    f"rank {description.rank}: coordinate is {description.coordinate}, and under {layout} the rank "
                    f"stands at {where}; return that"
                )


def _faults_of_groups(descriptions: Sequence[UnitDescription], name: GroupName) -> Iterator[str]:
    layout = descriptions[0].layout
    right = {rank: tuple(ranks) for ranks in layout.groups(*_AXES_OF[name]) for rank in ranks}
    listed = Counter(rank for ranks in {each.groups[name] for each in descriptions} for rank in set(ranks))
    for description in descriptions:
        rank, ranks = description.rank, description.groups[name]
        if ranks == right[rank]:
            continue
        strangers = [other for other in ranks if other not in right]
        disagreeing = [other for other in ranks if other in right and descriptions[other].groups[name] != ranks]
        if rank not in ranks:
            found = f"which lacks rank {rank} itself" + ("" if listed[rank] else ", as do those of all other ranks")
        elif len(set(ranks)) < len(ranks):
            found = "which names a rank twice"
        elif strangers:
            found = f"and there is no rank {strangers[0]} among the {len(descriptions)}"
        elif disagreeing:
            other = disagreeing[0]
            found = f"and rank {other}, which is in it, says {list(descriptions[other].groups[name])}"
        else:
            found = f"which is not the {name} group that it has under {layout}"
        yield f"rank {rank}: {name}.ranks is {list(ranks)}, {found}; return {list(right[rank])}"


def _faults_of_ranks(descriptions: Sequence[UnitDescription]) -> Iterator[str]:
    for description in descriptions:
        rank, ranks = description.rank, list(description.groups["data"])
        replicas = [descriptions[other].data_parallel_rank for other in ranks]
        if sorted(replicas) != list(range(len(ranks))):
            yield (
                f"rank {rank}: data_parallel_rank is {description.data_parallel_rank}, and in its data group {ranks} "
                f"they are {replicas}: replicas count from 0 to {len(ranks) - 1}; return {description.coordinate.data}"
            )
        head = descriptions[description.groups["model"][0]]
        if head.data_parallel_rank != description.data_parallel_rank:
            yield (
                f"rank {rank}: data_parallel_rank is {description.data_parallel_rank}, and on rank {head.rank}, which "
                f"holds another part of the same replica, {head.data_parallel_rank}, so that they would read other "
                f"samples; return {head.coordinate.data} on both"
            )
        if description.data_parallel_world_size != len(ranks):
            yield (
                f"rank {rank}: data_parallel_world_size is {description.data_parallel_world_size}, and its data group "
                f"is {ranks}; return {len(ranks)}"
            )
        yield from _faults_of_loader(description)
        for name, right in expected_answers(description).items():
            said = description.answers[name]
            if said != right:
                yield (
                    f"rank {rank}: {name} is {said}, and by the unit's groups, coordinate and placement {right}; "
                    "return that"
                )
    reporters = [description.rank for description in descriptions if description.should_report_metrics]
    if not reporters:
        yield "rank 0: should_report_metrics is False, as on every rank, and nobody would write metrics; return True"
    for rank in reporters[1:]:
        yield (
            f"rank {rank}: should_report_metrics is True, as on rank {reporters[0]}, and both would write the same "
            "files; return False on all but one"
        )


def _faults_of_loader(description: UnitDescription) -> Iterator[str]:
    if description.should_build_data_loader:
        return
    ends = {description.placement[-1]: "last stage, which reads the labels"}
    ends[description.placement[0]] = "first stage, which reads the inputs"
    if description.coordinate.pipe in ends:
        yield (
            f"rank {description.rank}: should_build_data_loader is False, and the rank holds the "
            f"{ends[description.coordinate.pipe]}; return True"
        )


def check_unit(
    unit: ModelParallelUnit, *, layout: Layout | None = None, placement: Sequence[int] | None = None
) -> None:
    """Check that the units of all ranks fit together. Every rank calls this at the same place.

    Args:
        unit: this rank's.
        layout: whose degrees it must have, where that is known; where ranks stand is the unit's.
        placement: the pipeline rank of each stage that it must have, where that is known.

    Raises:
        LayoutError: on every rank, with what each must answer instead.
    """
    mine: UnitDescription | str
    try:
        mine = describe_unit(unit)
        if layout is not None and _degrees(mine.layout) != _degrees(layout):
            raise LayoutError(
                f"rank {mine.rank}: layout is {mine.layout}, and that of the run is {layout}; make the unit of the "
                "layout that build_unit is given"
            )
        if placement is not None and mine.placement != tuple(placement):
            raise LayoutError(
                f"rank {mine.rank}: placement is {mine.placement}, and that of the run is {tuple(placement)}; make the "
                "unit of the placement that build_unit is given"
            )
    except LayoutError as error:
        mine = str(error)
    described: list[UnitDescription | str] = [mine] * dist.get_world_size()
    dist.all_gather_object(described, mine)
    faults = [report for report in described if isinstance(report, str)]
    faults = faults or find_unit_faults([report for report in described if not isinstance(report, str)])
    if faults:
        shown = faults[:_MOST_SHOWN]
        if len(faults) > len(shown):
            shown.append(f"and {len(faults) - len(shown)} more")
        raise LayoutError("\n  ".join(["the ranks' model-parallel units do not fit together:", *shown]))


def _degrees(layout: Layout) -> tuple[int, int, int]:
    return layout.pp, layout.dp, layout.tp
