"""Collectives of the tensor group over processes, against the tensors of all ranks put together."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from gloo_workers import GlooWorkers

pytestmark = pytest.mark.distributed


def of_rank(rank: int, shape: tuple[int, ...]) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(rank))


def exchange(rank: int, shape: tuple[int, ...], dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return a gathered tensor, a shard of the sum, and the sum."""
    from pipekit.distributed.mpu import ModelParallelUnit
    from pipekit.engine.tensor_group import ProcessTensorGroup
    from pipekit.layout import Layout

    group = ProcessTensorGroup(ModelParallelUnit(Layout(pp=1, dp=1, tp=2)).tensor)
    # What is not contiguous must come as if it were.
    own = of_rank(rank, shape).transpose(-1, -2).contiguous().transpose(-1, -2)
    gathered, scattered = group.all_gather(own, dim), group.reduce_scatter(own, dim)
    assert gathered.is_contiguous()
    assert not gathered._is_view()
    return gathered, scattered, group.all_reduce(own.clone())


@pytest.mark.parametrize(("shape", "dim"), [((1, 6, 4), 1), ((3, 6, 4), 1), ((6, 4), 0), ((3, 2, 4), 2)], ids=str)
def test_ranks_get_what_all_tensors_together_give(gloo: GlooWorkers, shape: tuple[int, ...], dim: int) -> None:
    tensors = [of_rank(rank, shape) for rank in range(2)]
    total = tensors[0] + tensors[1]
    for rank, (gathered, scattered, summed) in enumerate(gloo.run(2, exchange, shape, dim)):
        assert torch.equal(gathered, torch.cat(tensors, dim))
        assert torch.equal(scattered, total.chunk(2, dim)[rank])
        assert torch.equal(summed, total)
