"""Agreement of the ranks' model-parallel units: every rank's answers, compared before anything is trained."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch.distributed as dist

from pipekit.distributed.mpu import ModelParallelUnit
from pipekit.distributed.processes import gather_objects
from pipekit.errors import LayoutError
from pipekit.layout import Axis, Coordinate, Layout

_AXES_OF: dict[str, tuple[Axis, ...]] = {
    "pipe": ("pipe",),
    "data": ("data",),
    "tensor": ("tensor",),
    "model": ("pipe", "tensor"),
}

# An error that goes on for pages is not read.
_MOST_SHOWN = 6


@dataclass(frozen=True)
class MPUDescription:
    """The answers of a rank's unit, as plain data.

    Attributes:
        rank: the global rank, as torch.distributed knows it.
        layout: the unit's.
        placement: the pipeline rank of each stage.
        coordinate: the place of the rank by the unit.
        groups: the rank lists of its groups, by name.
        data_parallel_rank: the replica that it belongs to.
        should_build_data_loader: whether it reads batches.
        should_report_metrics: whether it writes metrics.
    """

    rank: int
    layout: Layout
    placement: tuple[int, ...]
    coordinate: Coordinate
    groups: Mapping[str, tuple[int, ...]]
    data_parallel_rank: int
    should_build_data_loader: bool
    should_report_metrics: bool


def describe_mpu(mpu: ModelParallelUnit) -> MPUDescription:
    """Collect the answers of this rank's unit.

    Raises:
        LayoutError: if it does not answer, or is none.
    """
    rank = dist.get_rank()
    if not isinstance(mpu, ModelParallelUnit):
        raise LayoutError(
            f"rank {rank}: the mpu is of the type {type(mpu).__name__}; give a pipekit.ModelParallelUnit, or a "
            "subclass of it"
        )
    try:
        return MPUDescription(
            rank=rank,
            layout=mpu.layout,
            placement=mpu.placement,
            coordinate=mpu.coordinate,
            groups={name: tuple(getattr(mpu, name).ranks) for name in _AXES_OF},
            data_parallel_rank=int(mpu.data_parallel_rank),
            should_build_data_loader=bool(mpu.should_build_data_loader),
            should_report_metrics=bool(mpu.should_report_metrics),
        )
    except Exception as error:
        raise LayoutError(
            f"rank {rank}: {type(mpu).__name__} raised {type(error).__name__}: {error}; let it answer on every rank, "
            "as ModelParallelUnit does"
        ) from error


def find_mpu_faults(descriptions: Sequence[MPUDescription]) -> list[str]:
    """List the answers of all ranks that do not fit together: the rank, its answer, and the right one.

    Args:
        descriptions: of every rank, in order.
    """
    return list(_differences(descriptions)) or list(_faults_of_ranks(descriptions))


def _differences(descriptions: Sequence[MPUDescription]) -> Iterator[str]:
    layout, placement = descriptions[0].layout, descriptions[0].placement
    for other in descriptions[1:]:
        if other.layout != layout:
            yield f"rank {other.rank}: layout is {other.layout}, and on rank 0 {layout}; make both the same"
        elif other.placement != placement:
            yield f"rank {other.rank}: placement is {other.placement}, and on rank 0 {placement}; make both the same"
    if layout.world_size != len(descriptions):
        yield (
            f"rank 0: layout is {layout}, which is {layout.world_size} ranks, and there are {len(descriptions)}: "
            f"return a layout whose degrees multiply to {len(descriptions)}"
        )
    elif set(placement) != set(range(layout.pp)):
        yield (
            f"rank 0: placement is {placement}: it must name every pipeline rank from 0 to {layout.pp - 1}, and no "
            f"other; return {tuple(range(layout.pp))} for one stage on each"
        )


def _faults_of_ranks(descriptions: Sequence[MPUDescription]) -> Iterator[str]:
    layout, placement = descriptions[0].layout, descriptions[0].placement
    for each in descriptions:
        rank, place = each.rank, layout.coordinate(each.rank)
        if each.coordinate != place:
            yield f"rank {rank}: coordinate is {each.coordinate}, and under {layout} it is {place}; return that"
        for name, axes in _AXES_OF.items():
            right = _ranks_along(layout, rank, *axes)
            if list(each.groups[name]) != right:
                yield f"rank {rank}: {name}.ranks is {list(each.groups[name])}, and under {layout} {right}; return that"
        replicas = [descriptions[other].data_parallel_rank for other in _ranks_along(layout, rank, "data")]
        heads = {descriptions[other].data_parallel_rank for other in _ranks_along(layout, rank, "pipe", "tensor")}
        if sorted(replicas) != list(range(layout.dp)) or len(heads) > 1:
            yield (
                f"rank {rank}: data_parallel_rank is {each.data_parallel_rank}; it must differ within a data group, "
                f"count from 0 to {layout.dp - 1}, and be one for all that hold parts of one replica: return "
                f"{place.data}"
            )
        if place.pipe in (placement[0], placement[-1]) and not each.should_build_data_loader:
            yield (
                f"rank {rank}: should_build_data_loader is False, and the rank holds the first stage, which reads the "
                "inputs, or the last, which reads the labels; return True"
            )
    reporters = [each.rank for each in descriptions if each.should_report_metrics]
    if len(reporters) != 1:
        yield f"should_report_metrics is True on the ranks {reporters}; return True on one rank, which writes the files"


def check_mpu(mpu: ModelParallelUnit, *, layout: Layout | None = None, placement: Sequence[int] | None = None) -> None:
    """Check that the units of all ranks fit together. Every rank calls this at the same place.

    Args:
        mpu: this rank's.
        layout: whose degrees it must have, where that is known; the order of its axes is the unit's.
        placement: the pipeline rank of each stage that it must have, where that is known.

    Raises:
        LayoutError: on every rank, with the right answers.
    """
    mine: MPUDescription | str
    try:
        mine = describe_mpu(mpu)
        if layout is not None and _degrees(mine.layout) != _degrees(layout):
            raise LayoutError(
                f"rank {mine.rank}: layout is {mine.layout}, and that of the run is {layout}; make the unit of the "
                "layout that build_mpu is given"
            )
        if placement is not None and mine.placement != tuple(placement):
            raise LayoutError(
                f"rank {mine.rank}: placement is {mine.placement}, and that of the run is {tuple(placement)}; make the "
                "unit of the placement that build_mpu is given"
            )
    except LayoutError as error:
        mine = str(error)
    described = gather_objects(mine)
    faults = [report for report in described if isinstance(report, str)]
    faults = faults or find_mpu_faults([report for report in described if not isinstance(report, str)])
    if faults:
        shown = faults[:_MOST_SHOWN]
        if len(faults) > len(shown):
            shown.append(f"and {len(faults) - len(shown)} more")
        raise LayoutError("\n  ".join(["the ranks' model-parallel units do not fit together:", *shown]))


def _ranks_along(layout: Layout, rank: int, *axes: Axis) -> list[int]:
    return next(ranks for ranks in layout.groups(*axes) if rank in ranks)


def _degrees(layout: Layout) -> tuple[int, int, int]:
    return layout.pp, layout.dp, layout.tp
