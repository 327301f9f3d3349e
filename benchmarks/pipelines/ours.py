"""Our pipeline."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from pipekit.distributed.mpu import ModelParallelUnit
from pipekit.engine.engine import PipelineEngine
from pipekit.engine.module import PipelineModule
from pipekit.layout import Layout
from pipekit.schedules import Costs, Schedule
from pipelines.ranks import WAIT_LIMIT_S
from pipelines.turns import Step
from pipelines.workload import Workload

MEASURED_STEPS = 3
"""Steps that the engine times before it plans a table for what they cost."""


def build_engine(
    workload: Workload,
    *,
    table: Schedule,
    boundaries: Sequence[int],
    replan: Callable[[Costs], Schedule] | None = None,
    profile: bool = False,
) -> PipelineEngine:
    """Return our engine.

    Args:
        workload: what is trained.
        table: what the engine does.
        boundaries: stage `s` holds layers `boundaries[s]` to `boundaries[s + 1] - 1`.
        replan: returns a table for what the layers cost in the first steps, which are run with `table`.
        profile: whether to time every action.
    """
    unit = ModelParallelUnit(Layout(pp=workload.pp), placement=table.placement, timeout_s=WAIT_LIMIT_S)
    module = PipelineModule(workload.specs, mpu=unit, boundaries=boundaries, loss_fn=workload.loss_fn)
    return PipelineEngine(
        module,
        build_optimizer=workload.build_optimizer,
        deepspeed_config=workload.deepspeed_config(),
        plan_schedule=lambda _, costs: table if costs is None or replan is None else replan(costs),
        measure_costs=replan is not None,
        profile=profile,
    )


def build_ours(
    workload: Workload,
    *,
    table: Schedule,
    boundaries: Sequence[int],
    replan: Callable[[Costs], Schedule] | None = None,
) -> Step:
    """Return a step of our engine; where there is a `replan`, the steps that it times have been done."""
    engine = build_engine(workload, table=table, boundaries=boundaries, replan=replan)

    def step() -> float:
        return float(engine.train_batch(workload.micro_batches()))

    if replan is not None:
        for _ in range(MEASURED_STEPS):
            step()
    return step
