"""Inputs of the partitioners for a planned model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import attrgetter

from pipekit.partitioners import PartitionInputs
from pipekit.predictions.layer_costs import ModelCosts
from pipekit.predictions.memory import memory_limit
from pipekit.predictions.parallel_plan import ParallelPlan
from pipekit.predictions.prediction import PlannedModel
from pipekit.schedules import Schedule

_flops, _seconds = attrgetter("flops"), attrgetter("seconds")


def partition_inputs(
    model: PlannedModel,
    plan: ParallelPlan,
    schedule: Schedule,
    *,
    type_names: Sequence[str],
    limit_bytes: Callable[[], int],
) -> PartitionInputs:
    """Inputs of the partitioners; costs of layers, and the memory of a rank, are computed when a partitioner asks."""

    def costs() -> ModelCosts:
        return model.recomputing_costs(plan)

    def extras(method: str) -> list[float] | None:
        cost = {"flops": _flops, "profile": _seconds}.get(method)
        return None if cost is None else costs().stage_extras(schedule.num_stages, cost)

    return PartitionInputs(
        type_names,
        # Frozen weights are computed with, too.
        lambda: [sum(both) for both in zip(model.layer_parameters, model.frozen_parameters, strict=True)],
        count_flops=lambda: list(map(_flops, costs().layers)),
        measure_seconds=(lambda: list(map(_seconds, costs().layers))) if model.is_timed else None,
        stage_extras=extras,
        memory_limit=lambda: memory_limit(
            costs(),
            schedule,
            precision=model.precision,
            zero=plan.zero,
            dp=plan.layout.dp,
            optimizer_states=model.optimizer_states,
            limit_bytes=limit_bytes(),
            frozen_parameters=model.frozen_parameters,
            offload=model.offload,
        ),
        layer_names=model.layer_names,
        placement=schedule.placement,
    )
