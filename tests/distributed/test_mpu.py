"""The groups of a model-parallel unit under every order of the axes."""

from __future__ import annotations

from itertools import permutations

import pytest

from gloo_workers import GlooWorkers
from pipekit.layout import Axis, Layout, Order

pytestmark = pytest.mark.distributed

AXES: tuple[Axis, ...] = ("pipe", "data", "tensor")
ORDERS: list[Order] = [(one, two, three) for one, two, three in permutations(AXES)]


def sums(rank: int, layout: Layout) -> list[tuple[float, list[int]]]:
    """Return the sums of the ranks in this rank's groups, and the groups that the layout gives it."""
    import torch
    import torch.distributed as dist

    from pipekit.distributed.mpu import ModelParallelUnit

    unit = ModelParallelUnit(layout)
    found = []
    for group, axes in (
        (unit.pipe, ("pipe",)),
        (unit.data, ("data",)),
        (unit.tensor, ("tensor",)),
        (unit.model, ("pipe", "tensor")),
    ):
        total = torch.tensor(float(2**rank))
        dist.all_reduce(total, group=group.process_group)
        (own,) = (ranks for ranks in layout.groups(*axes) if rank in ranks)  # type: ignore[arg-type]
        assert group.ranks == own
        assert group.rank == own.index(rank)
        found.append((float(total), own))
    return found


@pytest.mark.parametrize("order", ORDERS, ids="-".join)
def test_groups_talk_to_the_ranks_of_the_layout(gloo: GlooWorkers, order: Order) -> None:
    for found in gloo.run(8, sums, Layout(2, 2, 2, order=order)):
        for total, ranks in found:
            assert total == sum(2**rank for rank in ranks)


def split_world(rank: int, layout: Layout) -> tuple[list[list[list[int]]], list[list[int]]]:
    """Build a unit where the world can be split, and return the calls that split it, and the ranks of its groups."""
    from datetime import timedelta
    from unittest import mock

    import torch.distributed as dist

    from pipekit.distributed import mpu

    calls: list[list[list[int]]] = []

    def split_group(*, split_ranks: list[list[int]], timeout: timedelta) -> dist.ProcessGroup | None:
        calls.append(split_ranks)
        groups = [dist.new_group(ranks, timeout=timeout) for ranks in split_ranks]
        return next((group for group, ranks in zip(groups, split_ranks, strict=True) if rank in ranks), None)

    splits = mock.patch.object(mpu, "_splits_world", return_value=True)
    with splits, mock.patch.object(dist, "split_group", split_group):
        unit = mpu.ModelParallelUnit(layout)
        again = unit.build_group(layout.groups("data"))
    assert again is unit.data
    for group in (unit.pipe, unit.data, unit.tensor, unit.model):
        assert dist.get_process_group_ranks(group.process_group) == group.ranks
    return calls, [group.ranks for group in (unit.pipe, unit.data, unit.tensor, unit.model)]


def test_over_nccl_the_groups_along_an_axis_are_one_split_of_the_world(gloo: GlooWorkers) -> None:
    layout = Layout(2, 2, 2)
    axes: list[list[Axis]] = [["pipe"], ["data"], ["tensor"], ["pipe", "tensor"]]
    for rank, (calls, groups) in enumerate(gloo.run(8, split_world, layout)):
        assert calls == [layout.groups(*along) for along in axes]
        assert groups == [next(ranks for ranks in layout.groups(*along) if rank in ranks) for along in axes]
