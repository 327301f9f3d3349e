"""Role of a rank in training and evaluation: its replica, whether it reads batches, and whether its metrics count."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

from pipekit.distributed.mpu import ModelParallelUnit
from pipekit.errors import LayoutError


@dataclass(frozen=True)
class RankRole:
    """Role of a rank: everything that training needs to know about the parallelization of a model.

    Attributes:
        data_parallel_rank: index of the rank's replica.
        data_parallel_world_size: number of replicas.
        should_report_metrics: whether the metrics of the rank's batches count; usually true on one rank per replica.
        should_build_data_loader: whether the rank reads batches; true on at least one rank per replica.
    """

    data_parallel_rank: int
    data_parallel_world_size: int
    should_report_metrics: bool
    should_build_data_loader: bool


def role_of(mpu: Any) -> RankRole:
    """Return this rank's role from a `ModelParallelUnit`, or from any object with the attributes of `RankRole`.

    With a unit, the first tensor-parallel rank of the last stage reports: its peers see the same outputs, and other
    stages see none.

    Raises:
        LayoutError: if an attribute is missing or has the wrong type.
    """
    if isinstance(mpu, ModelParallelUnit):
        reports = mpu.is_last_stage and mpu.coordinate.tensor == 0
        return RankRole(mpu.data_parallel_rank, mpu.data_parallel_world_size, reports, mpu.should_build_data_loader)
    answers: dict[str, Any] = {}
    for field in fields(RankRole):
        answer = getattr(mpu, field.name, None)
        kind = bool if field.name.startswith("should") else int
        if type(answer) is not kind:
            what = f"has {field.name}={answer!r}" if hasattr(mpu, field.name) else f"has no {field.name}"
            raise LayoutError(
                f"set_mpu: the {type(mpu).__name__} {what}; give a pipekit.ModelParallelUnit, or "
                f"RankRole({', '.join(f'{each.name}=...' for each in fields(RankRole))})"
            )
        answers[field.name] = answer
    return RankRole(**answers)


def check_roles(roles: Sequence[RankRole]) -> None:
    """Check that the roles of all ranks, in rank order, fit together.

    Raises:
        LayoutError: if ranks give different numbers of replicas, or a replica has no rank that reads batches or none
            that reports.

    Example:
        >>> check_roles([RankRole(0, 2, True, True)] * 2)  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ...
        pipekit.errors.LayoutError: replica 1 of 2: no rank has should_build_data_loader=True, so that nobody ...
    """
    number = roles[0].data_parallel_world_size
    for rank, role in enumerate(roles):
        if role.data_parallel_world_size != number:
            raise LayoutError(
                f"rank 0 has data_parallel_world_size={number}, and rank {rank} has {role.data_parallel_world_size}; "
                "answer the same on all ranks in set_mpu"
            )
        if not 0 <= role.data_parallel_rank < number:
            raise LayoutError(
                f"rank {rank} has data_parallel_rank={role.data_parallel_rank}, which is not one of the "
                f"{number} replicas; number them from 0 in set_mpu"
            )
    for answer, effect in (
        ("should_build_data_loader", "nobody reads its batches"),
        ("should_report_metrics", "its batches would be missing in the metrics"),
    ):
        for replica in range(number):
            if not any(getattr(role, answer) for role in roles if role.data_parallel_rank == replica):
                raise LayoutError(
                    f"replica {replica} of {number}: no rank has {answer}=True, so that {effect}; answer otherwise in "
                    "set_mpu"
                )
