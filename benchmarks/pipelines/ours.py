"""Our pipeline under each of its schedules, and what its simulator says of them."""

from __future__ import annotations

from collections.abc import Sequence

from pipelines.turns import Step
from pipelines.workload import Workload
from pipekit.engine.engine import PipelineEngine
from pipekit.engine.module import PipelineModule
from pipekit.engine.mpu import ModelParallelUnit
from pipekit.layout import Layout

WAIT_LIMIT_S = 120.0


def build_ours(workload: Workload, *, schedule: str, boundaries: Sequence[int]) -> Step:
    """Return a step of our engine; stage `s` holds layers `boundaries[s]` to `boundaries[s + 1] - 1`."""
    assert schedule == "1f1b", schedule
    unit = ModelParallelUnit(Layout(pp=workload.pp), timeout_s=WAIT_LIMIT_S)
    module = PipelineModule(workload.specs, mpu=unit, boundaries=boundaries, loss_fn=workload.loss_fn)
    engine = PipelineEngine(
        module, mpu=unit, build_optimizer=workload.build_optimizer, deepspeed_config=workload.deepspeed_config()
    )
    return lambda: float(engine.train_batch(workload.micro_batches()))
