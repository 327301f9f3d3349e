"""Our pipeline."""

from __future__ import annotations

from collections.abc import Sequence

from pipekit.distributed.mpu import ModelParallelUnit
from pipekit.engine.engine import PipelineEngine
from pipekit.engine.module import PipelineModule
from pipekit.layout import Layout
from pipekit.schedules import Schedule
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
    measure_costs: bool = False,
    max_in_flight: int | None = None,
    profile: bool = False,
) -> PipelineEngine:
    """Return our engine.

    Args:
        workload: what is trained.
        table: what the engine does.
        boundaries: stage `s` holds layers `boundaries[s]` to `boundaries[s + 1] - 1`.
        measure_costs: whether to plan another table, for what the layers cost in the first steps, which run `table`.
        max_in_flight: the activations that a rank may hold under that other table.
        profile: whether to time every action.
    """
    unit = ModelParallelUnit(Layout(pp=workload.pp), placement=table.placement, timeout_s=WAIT_LIMIT_S)
    module = PipelineModule(workload.specs, mpu=unit, boundaries=boundaries, loss_fn=workload.loss_fn, schedule=table)
    return PipelineEngine(
        module,
        build_optimizer=workload.build_optimizer,
        deepspeed_config=workload.deepspeed_config(),
        measure_costs=measure_costs,
        max_in_flight=max_in_flight,
        profile=profile,
    )


def build_ours(
    workload: Workload,
    *,
    table: Schedule,
    boundaries: Sequence[int],
    measure_costs: bool = False,
    max_in_flight: int | None = None,
) -> Step:
    """Return a step of our engine; with `measure_costs`, the steps that it times have been done."""
    engine = build_engine(
        workload, table=table, boundaries=boundaries, measure_costs=measure_costs, max_in_flight=max_in_flight
    )

    def step() -> float:
        return float(engine.train_batch(workload.micro_batches()))

    if measure_costs:
        for _ in range(MEASURED_STEPS):
            step()
    return step
