"""Gathering metrics: what the reducers of all ranks saw, reduced to one dict that every rank gets."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.distributed as dist

from pipekit.distributed.messages import encode_message
from pipekit.distributed.processes import gather_objects, tell_object
from pipekit.errors import CommunicationError, PipekitError
from pipekit.training.reducers import WrappedReducer, combine_slots, reduce_per_slot


def gather_metrics(
    reducers: Sequence[WrappedReducer], *, reports: bool, group: dist.ProcessGroup | None = None
) -> dict[str, float]:
    """Return the metrics of all reducers over the ranks that report. All ranks of the group call this together.

    The values go to the group's first rank, which alone reduces them, and the metrics from there to all, so that all
    ranks decide by the same numbers. Call it where metrics are reported, not at every batch: it waits for every rank.

    Args:
        reducers: the same on every rank, in the same order.
        reports: whether this rank is one whose values count: one rank of each replica, for tensor-parallel peers saw
            the same values, and stages other than the last none.
        group: the ranks; all of them unless given. A process that has joined no others is alone.

    Raises:
        PipekitError: on every rank, if a reducer fails or returns something wrong on any, if no rank reports, or if
            the ranks have different reducers.
        CommunicationError: if a rank is gone, or the wait lasts longer than the group's time limit.
    """
    is_alone = not dist.is_initialized() or dist.get_world_size(group) == 1
    mine = _pack(reducers, reports)
    if is_alone:
        outcome = _combine(reducers, [mine])
    else:
        try:
            gathered = gather_objects(mine, group, to_first=True)
            own: list[dict[str, float] | str] | None = [_combine(reducers, gathered)] if gathered else None
            (outcome,) = tell_object(own, group)
        except RuntimeError as error:
            reason = str(error).strip().partition("\n")[0] or type(error).__name__
            raise CommunicationError(
                f"rank {dist.get_rank()} failed while waiting for the metrics of all ranks: {reason}"
            ) from error
    if isinstance(outcome, str):
        raise PipekitError(outcome)
    return outcome


def _pack(reducers: Sequence[WrappedReducer], reports: bool) -> tuple[int, list[str], Any]:
    """This rank's reducers and their values, or what is wrong with them, so that the others do not wait."""
    rank, names = dist.get_rank() if dist.is_initialized() else 0, [str(wrapped) for wrapped in reducers]
    try:
        slot = reduce_per_slot(reducers) if reports else None
    except PipekitError as error:
        return rank, names, str(error)
    for name, value in zip(names, slot or (), strict=False):
        try:
            encode_message(value)
        except TypeError as error:
            return rank, names, f"{name}: of what per_slot_reduce returned, {error}"
    return rank, names, slot


def _combine(
    reducers: Sequence[WrappedReducer], gathered: Sequence[tuple[int, list[str], Any]]
) -> dict[str, float] | str:
    """Return the metrics, or the message of an error."""
    try:
        slots = []
        names = [str(wrapped) for wrapped in reducers]
        for rank, theirs, slot in gathered:
            if isinstance(slot, str):
                return f"rank {rank}: {slot}"
            if theirs != names:
                return (
                    f"rank {rank} wraps other reducers, {', '.join(theirs) or 'none'}, than the group's first, "
                    f"{', '.join(names) or 'none'}; call wrap_reducer alike on every rank"
                )
            if slot is not None:
                slots.append(slot)
        if not slots:
            return "no rank reports metrics: should_report_metrics is False on all; return True on one of each replica"
        return combine_slots(reducers, slots)
    except Exception as error:
        return str(error) if isinstance(error, PipekitError) else f"{type(error).__name__}: {error}"
