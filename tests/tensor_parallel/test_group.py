"""Peers that are not there give the shapes that those that are there give."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from pipekit.tensor_parallel import PlannedGroup, TensorGroup
from tensor_parallel.threads import run_ranks

COLLECTIVES: dict[str, Callable[[TensorGroup, Tensor], Tensor]] = {
    "all_reduce": lambda group, x: group.all_reduce(x),
    **{f"all_gather_{dim}": lambda group, x, dim=dim: group.all_gather(x, dim) for dim in range(3)},  # type: ignore[misc]
    **{f"reduce_scatter_{dim}": lambda group, x, dim=dim: group.reduce_scatter(x, dim) for dim in range(3)},  # type: ignore[misc]
}


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("name", COLLECTIVES)
def test_planned_shapes_are_the_real_ones(name: str, size: int) -> None:
    def shape_and_type(group: TensorGroup, device: str) -> tuple[torch.Size, torch.dtype]:
        result = COLLECTIVES[name](group, torch.ones(6, 12, 18, dtype=torch.bfloat16, device=device))
        assert result.device.type == device
        return result.shape, result.dtype

    planned = [shape_and_type(PlannedGroup(rank, size), "meta") for rank in range(size)]
    assert planned == run_ranks(size, lambda group: shape_and_type(group, "cpu"))


@pytest.mark.parametrize("name", ["all_gather_1", "reduce_scatter_1"])
def test_a_planned_group_returns_new_tensors(name: str) -> None:
    x = torch.zeros(6, 12, 18)
    COLLECTIVES[name](PlannedGroup(1, 2), x).add_(1)
    assert x.count_nonzero() == 0
