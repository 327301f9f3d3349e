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
