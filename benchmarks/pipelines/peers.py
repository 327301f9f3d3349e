"""The peers' pipelines, raw DeepSpeed's and torch's, each built as its own documentation builds it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from deepspeed.pipe import LayerSpec as DeepSpeedLayerSpec
from deepspeed.pipe import PipelineModule as DeepSpeedPipelineModule
from torch import Tensor
from torch.distributed.pipelining import PipelineStage, Schedule1F1B

import deepspeed
from pipekit.deepspeed.patches import use_joined_processes
from pipelines.turns import Step
from pipelines.workload import Workload


def build_deepspeed(workload: Workload, *, partition: str) -> Step:
    """Return a step of DeepSpeed's own pipeline engine; its schedule is 1F1B, `partition` its `partition_method`."""
    module = build_deepspeed_module(workload, partition=partition)
    parameters = list(module.parameters())
    engine, *_ = deepspeed.initialize(
        model=module,
        optimizer=workload.build_optimizer(parameters),
        model_parameters=parameters,
        config=workload.deepspeed_config(),
    )
    return lambda: float(engine.train_batch(workload.micro_batches()))


def build_deepspeed_module(workload: Workload, *, partition: str) -> DeepSpeedPipelineModule:
    """Return this rank's layers as DeepSpeed cuts them, `partition` being its `partition_method`."""
    use_joined_processes()
    return DeepSpeedPipelineModule(
        [DeepSpeedLayerSpec(spec.typename, *spec.module_args, **spec.module_kwargs) for spec in workload.specs],
        num_stages=workload.pp,
        loss_fn=workload.loss_fn,
        partition_method=partition,
    )


def build_torch(workload: Workload, *, boundaries: Sequence[int]) -> Step:
    """Return a step of torch's 1F1B."""
    rank, last = dist.get_rank(), workload.pp - 1
    layers = workload.build_stage(boundaries, rank)
    stage = PipelineStage(layers, stage_index=rank, num_stages=workload.pp, device=torch.device("cpu"))
    schedule = Schedule1F1B(stage, workload.num_micro_batches, loss_fn=workload.loss_fn)
    optimizer = workload.build_optimizer(list(layers.parameters()))

    def step() -> float | None:
        losses: list[Tensor] = []
        if rank == 0:
            schedule.step(workload.inputs, return_outputs=False)
        elif rank == last:
            schedule.step(target=workload.labels, losses=losses, return_outputs=False)
        else:
            schedule.step(return_outputs=False)
        optimizer.step()
        optimizer.zero_grad()
        return float(torch.stack(losses).mean()) if losses else None

    return step
