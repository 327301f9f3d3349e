"""The peers' pipelines, raw DeepSpeed's and torch's, each built as its own documentation builds it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.pipe import LayerSpec as DeepSpeedLayerSpec
from deepspeed.pipe import PipelineModule as DeepSpeedPipelineModule
from torch import Tensor
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import PipelineScheduleSingle, get_schedule_class

import deepspeed
from pipekit.deepspeed.patches import use_joined_processes
from pipelines.settings import TORCH_V_SCHEDULES
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


def build_torch(workload: Workload, *, schedule: str, boundaries: Sequence[int]) -> Step:
    """Return a step of one of torch's schedules, by its name in `get_schedule_class`.

    `1F1B` has one stage on each rank. The others have two: those whose names end in V go down the ranks and back up,
    and `Interleaved...` goes down twice.
    """
    rank, num_stages = dist.get_rank(), len(boundaries) - 1
    second = 2 * workload.pp - 1 - rank if schedule in TORCH_V_SCHEDULES else rank + workload.pp
    stages, parameters = [], []
    for index in [rank, second][: num_stages // workload.pp]:
        layers = workload.build_stage(boundaries, index)
        for layer in layers:
            if hasattr(layer, "has_own_weight_node"):
                layer.has_own_weight_node = True
        stages.append(PipelineStage(layers, stage_index=index, num_stages=num_stages, device=torch.device("cpu")))
        parameters += list(layers.parameters())
    kind = get_schedule_class(schedule)
    is_single = issubclass(kind, PipelineScheduleSingle)
    runner: Any = kind(stages[0] if is_single else stages, workload.num_micro_batches, loss_fn=workload.loss_fn)
    optimizer = workload.build_optimizer(parameters)
    inputs = [workload.inputs] if stages[0].is_first else []
    is_last = any(stage.is_last for stage in stages)

    def step() -> float | None:
        losses: list[Tensor] = []
        labels = {"target": workload.labels, "losses": losses} if is_last else {}
        runner.step(*inputs, **labels, return_outputs=False)
        optimizer.step()
        optimizer.zero_grad()
        return float(torch.stack(losses).mean()) if losses else None

    return step
