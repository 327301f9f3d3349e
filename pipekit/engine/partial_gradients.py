"""Gradients of which each tensor-parallel rank has a part, summed before they are used for anything else."""

from __future__ import annotations

from collections.abc import Iterable

import torch.distributed as dist
from torch import Tensor, nn

from pipekit.distributed.mpu import RankGroup


def sum_gradients_over(group: RankGroup, parameters: Iterable[nn.Parameter]) -> None:
    """Sum the gradient of each parameter over a group whenever it is computed.

    ZeRO-2 and 3 reduce a gradient over the replicas as soon as it is there, and keep a piece of it; what is to be
    summed over other ranks must be summed before. All ranks of the group run the same backwards, so that they meet in
    the same order.

    Args:
        group: the ranks to sum over.
        parameters: the same on each rank, in the same order.
    """
    if group.size == 1:
        return

    def total(gradient: Tensor) -> Tensor:
        summed = gradient.contiguous().clone()
        dist.all_reduce(summed, group=group.process_group)
        return summed

    for parameter in parameters:
        parameter.register_hook(total)  # type: ignore[no-untyped-call]
