"""The data-parallel reduction of gradients, begun for each stage as soon as its last gradient is there."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pipekit.deepspeed.optimizer_view import OptimizerView
from pipekit.distributed.mpu import RankGroup
from pipekit.engine.channels import wait

_BUCKET_ELEMENTS = 10_000_000


@dataclass(frozen=True)
class _Bucket:
    gradients: list[Tensor]
    flat: Tensor
    work: dist.Work


class GradientReducer:
    """Averages gradients over the replicas of a stage, in buckets, behind what is still computed.

    Args:
        view: where the gradients are.
        group: the replicas.
    """

    def __init__(self, view: OptimizerView, group: RankGroup) -> None:
        self._view = view
        self._group = group
        self._buckets: list[_Bucket] = []

    def start(self, parameters: Iterable[nn.Parameter]) -> None:
        """Begin to reduce the gradients of `parameters`. All replicas call this with the same ones, in one order."""
        if self._group.size == 1:
            return
        waiting: list[Tensor] = []
        for parameter in parameters:
            waiting.append(self._view.gradient_or_zeros(parameter))
            if sum(gradient.numel() for gradient in waiting) >= _BUCKET_ELEMENTS:
                self._reduce(waiting)
                waiting = []
        if waiting:
            self._reduce(waiting)

    def _reduce(self, gradients: list[Tensor]) -> None:
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        work = dist.all_reduce(flat, group=self._group.process_group, async_op=True)
        assert work is not None
        self._buckets.append(_Bucket(gradients, flat, work))

    def finish(self) -> None:
        """Wait until everything begun is reduced, and set the gradients to their means."""
        for bucket in self._buckets:
            wait(bucket.work, "the gradients of the other replicas")
            bucket.flat.div_(self._group.size)
            means = torch.split(bucket.flat, [gradient.numel() for gradient in bucket.gradients])
            for gradient, mean in zip(bucket.gradients, means, strict=True):
                gradient.copy_(mean.view_as(gradient))
        self._buckets = []
