"""Training losses of a trial that are not finite: the metric, and the batch and the rank that it comes from."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from pipekit.distributed.processes import gather_objects


def describe_nonfinite(
    metrics: Mapping[str, Any], batches: Sequence[Mapping[str, float]], *, batch: int, calls: int
) -> str | None:
    """Return a warning of the first loss that is not finite since the last report; None if all are finite.

    The metrics are the same on all ranks, which call this together. A loss is what has "loss" in its name.

    Args:
        metrics: what is reported, over all batches and ranks.
        batches: this rank's metrics of each call of `train_batch` since the last report.
        batch: number of the batch that the last call belongs to, from 1.
        calls: calls of a batch.
    """
    numbers = {name: value for name, value in metrics.items() if isinstance(value, (int, float))}
    names = [name for name, value in numbers.items() if "loss" in name and not math.isfinite(value)]
    if not names:
        return None
    found = [
        (batch - (len(batches) - 1 - call) // calls, name)
        for call, each in enumerate(batches)
        for name in names
        if not math.isfinite(each.get(name, 0.0))
    ]
    firsts = [(first, rank) for rank, first in enumerate(gather_objects(found[0] if found else None)) if first]
    if not firsts:
        return f"batch {batch}: {names[0]} is {metrics[names[0]]}, though it is finite in every batch"
    (number, name), rank = min(firsts)
    return f"batch {number}: {name} is not finite on rank {rank}"
