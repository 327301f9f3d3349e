"""Measurements: the difference of a tensor or number from that of one process, and the first of many differences."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

MeasurementKind = Literal["initial weights", "output", "loss", "input gradient", "gradient", "gradient norm", "weights"]

_WORDS: dict[MeasurementKind, str] = {
    "initial weights": "initial weights",
    "output": "outputs",
    "loss": "loss",
    "input gradient": "input gradients",
    "gradient": "gradients",
    "gradient norm": "gradient norm",
    "weights": "weights",
}
KINDS: tuple[MeasurementKind, ...] = tuple(_WORDS)
"""In the order of cause: what comes later is made of what comes before."""

TOLERANCE = 1e-4
"""Largest allowed difference of a loss, an output or a gradient from that of one process, relative to its norm."""


LOSS = "the loss"
"""Name of the place behind the last layer."""

MEASUREMENTS_FILE = "measurements.json"


@dataclass(frozen=True)
class Measurement:
    """Largest difference of one tensor or number from that of one process.

    Attributes:
        kind: what was compared.
        step: in which step.
        error: 2-norm of the difference over that of the tensor of one process; infinite where one of them is missing,
            not finite, or of another shape.
        excess: the difference over what is allowed; more than 1 is a fault.
        layer: name of the layer; None for a number of the whole step. An input gradient is that of the layer whose
            backward makes it; what the loss passes back belongs to `LOSS`.
        layer_idx: its index; that of the loss is the number of layers.
        tensor: name of the parameter, or the place in the layer's output or input.
        micro_batch: index of the micro-batch in the global batch; -1 for what belongs to the whole step.
        ranks: the ranks that hold a copy which is at fault, or else the one that is furthest off; empty for a number
            that all ranks have.
        num_copies: how many ranks, or groups of tensor-parallel ranks, hold a copy.
        num_wrong: how many of the copies are at fault.
        apart: the axes along which the copies differ from each other.
        ratio: what the tensor of one process, or the change of weights, must be multiplied with, where nothing else is
            wrong.
        share: the fraction of the elements that are at fault.
        found: the number, or the element that is furthest off.
        expected: the same in one process.
        note: what is wrong where nothing could be compared.
    """

    kind: MeasurementKind
    step: int
    error: float
    excess: float
    layer: str | None = None
    layer_idx: int = -1
    tensor: str = ""
    micro_batch: int = -1
    ranks: tuple[int, ...] = ()
    num_copies: int = 1
    num_wrong: int = 0
    apart: tuple[str, ...] = ()
    ratio: float | None = None
    share: float = 1.0
    found: float | None = None
    expected: float | None = None
    note: str = ""

    @property
    def is_fault(self) -> bool:
        """True if the difference is more than is allowed."""
        return not self.excess <= 1


def first_fault(measurements: Iterable[Measurement]) -> Measurement | None:
    """Return the fault that can have caused the others, or None where there is none.

    Steps come in order, and in each what is made first: weights, then outputs from the first layer to the last, the
    loss, input gradients from the last layer to the first, gradients of parameters, their norm, and the weights that
    the update leaves.

    Example:
        >>> late = Measurement("output", 0, error=0.5, excess=5000.0, layer="b", layer_idx=1)
        >>> early = Measurement("output", 0, error=0.1, excess=1000.0, layer="a", layer_idx=0, micro_batch=3)
        >>> loss = Measurement("loss", 0, error=0.9, excess=9000.0)
        >>> first_fault([loss, late, early]).layer
        'a'
    """
    return min(filter(lambda found: found.is_fault, measurements), key=_order_of_cause, default=None)


def _order_of_cause(found: Measurement) -> tuple[int, int, int, int, str]:
    layer_idx = -found.layer_idx if found.kind == "input gradient" else found.layer_idx
    return found.step, KINDS.index(found.kind), layer_idx, found.micro_batch, found.tensor


def worst(measurements: Iterable[Measurement], *kinds: MeasurementKind) -> Measurement | None:
    """Return the measurement of some kinds that comes closest to its limit, or goes furthest beyond."""
    return max((found for found in measurements if found.kind in kinds), key=lambda found: found.excess, default=None)


def others_at_fault(measurements: Iterable[Measurement], fault: Measurement) -> list[str]:
    """Return the names of the other layers that have a fault of the same kind in the same step, in order.

    Example:
        >>> faults = [Measurement("gradient", 0, 1.0, 10.0, layer=name) for name in "abb"]
        >>> others_at_fault(faults, faults[0])
        ['b']
    """
    return list(
        dict.fromkeys(
            found.layer
            for found in sorted(measurements, key=_order_of_cause)
            if found.is_fault and (found.kind, found.step) == (fault.kind, fault.step)
            if found.layer not in (None, fault.layer)
        )
    )


def agreeing(measurements: Sequence[Measurement], fault: Measurement) -> list[str]:
    """Return the kinds of tensors that agree before the fault, in words.

    Example:
        >>> before = Measurement("initial weights", 0, 0.0, 0.0, layer="a")
        >>> fault = Measurement("output", 0, 1.0, 10.0, layer="b", layer_idx=1)
        >>> agreeing([before, fault], fault)
        ['initial weights']
    """
    steps = {0: [], 1: ["all of step 1"]}.get(fault.step, [f"all of steps 1 to {fault.step}"])
    here = _order_of_cause(fault)
    before = {found.kind for found in measurements if found.step == fault.step and _order_of_cause(found) < here}
    return steps + [word for kind, word in _WORDS.items() if kind in before - {fault.kind}]


def save_measurements(path: Path, measurements: Sequence[Measurement], *, boundaries: Sequence[int]) -> None:
    """Write the measurements of a layout and the boundaries of its stages."""
    written = {"boundaries": list(boundaries), "measurements": [asdict(found) for found in measurements]}
    path.write_text(json.dumps(written), encoding="utf-8")


def load_measurements(path: Path) -> tuple[list[Measurement], list[int]]:
    """Read the measurements of a layout and the boundaries of its stages."""
    written = json.loads(path.read_text(encoding="utf-8"))
    lines = [{**line, "ranks": tuple(line["ranks"]), "apart": tuple(line["apart"])} for line in written["measurements"]]
    return [Measurement(**line) for line in lines], written["boundaries"]
