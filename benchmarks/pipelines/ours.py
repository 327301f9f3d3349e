"""Our pipeline."""

from __future__ import annotations

from collections.abc import Sequence

from pipekit.engine.engine import PipelineEngine
from pipekit.engine.module import PipelineModule
from pipekit.engine.mpu import ModelParallelUnit
from pipekit.layout import Layout
from pipekit.schedules import Schedule
from pipelines.ranks import LIMIT_S
from pipelines.turns import Step
from pipelines.workload import Workload


def build_ours(workload: Workload, *, table: Schedule, boundaries: Sequence[int]) -> Step:
    """Return a step of our engine, which does what `table` says."""
    unit = ModelParallelUnit(Layout(pp=workload.pp), placement=table.placement, timeout_s=LIMIT_S)
    module = PipelineModule(workload.specs, mpu=unit, boundaries=boundaries, loss_fn=workload.loss_fn)
    engine = PipelineEngine(
        module,
        mpu=unit,
        build_optimizer=workload.build_optimizer,
        deepspeed_config=workload.deepspeed_config(),
        plan_schedule=lambda num_micro_batches: table,
    )
    return lambda: float(engine.train_batch(workload.micro_batches()))
