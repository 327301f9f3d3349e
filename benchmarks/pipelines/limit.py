"""Limit that no pipeline of these layers can beat on this machine."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from pipelines.turns import Step
from pipelines.workload import Workload


def build_limit(workload: Workload, *, boundaries: Sequence[int]) -> Step:
    """Return a step in which each rank does the work of its own stage, beside the others and without them.

    For each micro-batch it runs the forward of the stage's layers on inputs of its own, then their backward, the last
    stage with the loss. Nothing is sent, nobody waits, and no optimizer updates. The stages differ in their work, so
    what counts is the mean of the ranks' times, not the longest.
    """
    rank = dist.get_rank()
    is_first, is_last = rank == 0, rank == workload.pp - 1
    stage = workload.build_stage(boundaries, rank)
    micro_batches = list(workload.micro_batches())
    received = None if is_first else _run_before(workload, boundaries, rank, micro_batches[0][0])
    with torch.no_grad():
        output_grad = torch.randn_like(stage(micro_batches[0][0] if received is None else received))

    def step() -> None:
        for parameter in stage.parameters():
            parameter.grad = None
        for inputs, labels in micro_batches:
            outputs = stage(inputs if received is None else received.detach().requires_grad_())
            if is_last:
                (workload.loss_fn(outputs, labels) / len(micro_batches)).backward()
            else:
                outputs.backward(output_grad)

    return step


def _run_before(workload: Workload, boundaries: Sequence[int], rank: int, inputs: Tensor) -> Tensor:
    """Return what the stages before a rank's make of a micro-batch."""
    with torch.no_grad():
        for stage in range(rank):
            inputs = workload.build_stage(boundaries, stage)(inputs)
    return inputs
