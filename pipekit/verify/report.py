"""Result of a verification, as plain data."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from pipekit.verify.explain import LayoutContext, describe, likely_cause, locate, quantify
from pipekit.verify.layouts import LayoutCandidate
from pipekit.verify.measurement import Measurement, MeasurementKind, agreeing, first_fault, others_at_fault, worst

COLUMNS: dict[str, tuple[MeasurementKind, ...]] = {
    "loss": ("loss",),
    "outputs": ("output",),
    "gradients": ("input gradient", "gradient", "gradient norm"),
    "weights": ("initial weights", "weights"),
}
"""Kinds of measurements of which each column of the table shows the largest relative difference."""


@dataclass(frozen=True)
class Result:
    """Result of one layout.

    Attributes:
        candidate: the layout.
        time_s: how long it took, in seconds.
        measurements: what was compared; empty where it failed.
        context: its stages and layer names; None where it failed.
        failure: why it failed; empty where it did not.
    """

    candidate: LayoutCandidate
    time_s: float
    measurements: Sequence[Measurement] = ()
    context: LayoutContext | None = None
    failure: str = ""

    @property
    def verdict(self) -> str:
        """`agrees`, `differs` or `failed`."""
        if self.failure:
            return "failed"
        return "agrees" if first_fault(self.measurements) is None else "differs"


def report(
    results: Sequence[Result],
    *,
    rejected: Sequence[tuple[LayoutCandidate, str]],
    notes: Sequence[str],
    **settings: str | float,
) -> dict[str, Any]:
    """Return a verification as JSON values; an infinite number, or one that was not compared, is null.

    Args:
        results: of each layout that was run.
        rejected: layouts that were not, and why.
        notes: what was changed, and what could not be compared.
        settings: model, device, precision, steps, global batch size and tolerance.
    """
    return {
        "agrees": all(result.verdict == "agrees" for result in results),
        **settings,
        "layouts": [_result(result) for result in results],
        "rejected": [{"layout": candidate.degrees, "reason": reason} for candidate, reason in rejected],
        "notes": list(notes),
    }


def _result(result: Result) -> dict[str, Any]:
    found: dict[str, Any] = {
        "layout": result.candidate.degrees,
        "configured": result.candidate.is_configured,
        "processes": result.candidate.layout.world_size,
        "verdict": result.verdict,
        "time_s": round(result.time_s, 3),
    }
    if result.failure:
        return {**found, "failure": result.failure}
    for column, kinds in COLUMNS.items():
        largest = worst(result.measurements, *kinds)
        found[column] = _finite(largest.error) if largest else None
    fault = first_fault(result.measurements)
    if fault is None:
        return found
    assert result.context is not None
    values = asdict(fault) | {
        name: _finite(getattr(fault, name)) for name in ("error", "excess", "ratio", "found", "expected")
    }
    found["first_difference"] = {
        **values,
        "ranks": list(fault.ranks),
        "apart": list(fault.apart),
        "what": describe(fault),
        "by": quantify(fault),
        "where": locate(fault, result.context),
        "cause": likely_cause(fault, result.context),
        "agrees_before": agreeing(result.measurements, fault),
        "other_layers": others_at_fault(result.measurements, fault),
    }
    return found


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
