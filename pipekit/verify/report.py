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


@dataclass(frozen=True)
class Verification:
    """Settings and results of a verification.

    Attributes:
        model: the model, in a few words.
        device: what it ran on.
        num_steps: updates under each layout.
        global_batch_size: sequences of a step.
        tolerance: the largest relative difference that is allowed.
        results: of each layout.
        rejected: layouts that do not fit, and why.
        notes: what was changed, and what could not be compared.
    """

    model: str
    device: str
    num_steps: int
    global_batch_size: int
    tolerance: float
    results: Sequence[Result]
    rejected: Sequence[tuple[LayoutCandidate, str]] = ()
    notes: Sequence[str] = ()

    @property
    def agrees(self) -> bool:
        """True if every layout that was run agrees with one process."""
        return all(result.verdict == "agrees" for result in self.results)


def report(verification: Verification) -> dict[str, Any]:
    """Return a verification as JSON values; an infinite number, or one that was not compared, is null."""
    return {
        "agrees": verification.agrees,
        "model": verification.model,
        "device": verification.device,
        "precision": "fp32",
        "steps": verification.num_steps,
        "global_batch_size": verification.global_batch_size,
        "tolerance": verification.tolerance,
        "layouts": [_result(result) for result in verification.results],
        "rejected": [{"layout": candidate.degrees, "reason": reason} for candidate, reason in verification.rejected],
        "notes": list(verification.notes),
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
