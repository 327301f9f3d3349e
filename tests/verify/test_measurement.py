"""The first of many differences."""

from __future__ import annotations

import math
import random
from pathlib import Path

from pipekit.verify.measurement import (
    Measurement,
    MeasurementKind,
    agreeing,
    first_fault,
    load_measurements,
    others_at_fault,
    save_measurements,
    worst,
)


def fault(kind: MeasurementKind, layer_idx: int = -1, *, step: int = 0, micro_batch: int = -1) -> Measurement:
    layer = None if layer_idx < 0 else f"layer-{layer_idx}"
    return Measurement(
        kind, step, 1.0, 1e4, layer=layer, layer_idx=layer_idx, tensor=f"{layer}.weight", micro_batch=micro_batch
    )


CAUSES = [
    fault("initial weights", 2),
    fault("initial weights", 3),
    fault("output", 0, micro_batch=3),
    fault("output", 1, micro_batch=0),
    fault("output", 1, micro_batch=1),
    fault("loss"),
    fault("input gradient", 3, micro_batch=0),
    fault("input gradient", 1, micro_batch=0),
    fault("gradient", 0),
    fault("gradient", 3),
    fault("gradient norm"),
    fault("weights", 0),
    fault("loss", step=1),
    fault("gradient", 1, step=1),
    fault("gradient norm", step=1),
    fault("weights", 0, step=1),
]
"""In the order in which one causes the next."""


def test_a_cause_comes_before_its_effects() -> None:
    for first in range(len(CAUSES)):
        shuffled = CAUSES[first:]
        random.Random(first).shuffle(shuffled)
        assert first_fault(shuffled) == CAUSES[first]


def test_a_measurement_within_its_limit_is_no_fault() -> None:
    within = Measurement("output", 0, error=9e-5, excess=0.9, layer="a", layer_idx=0)
    assert first_fault([within]) is None
    assert first_fault([within, CAUSES[-1]]) == CAUSES[-1]
    assert Measurement("output", 0, error=math.inf, excess=math.inf).is_fault
    assert Measurement("output", 0, error=math.nan, excess=math.nan).is_fault


def test_the_worst_is_the_closest_to_its_limit() -> None:
    noisy = Measurement("gradient", 0, error=0.5, excess=0.2)
    wrong = Measurement("gradient", 0, error=0.1, excess=3.0)
    assert worst([noisy, wrong], "gradient") is wrong
    assert worst([noisy, wrong], "output") is None


def test_others_have_a_fault_of_the_same_kind_in_the_same_step() -> None:
    faults = [fault("gradient", 0), fault("gradient", 2), fault("output", 1), fault("gradient", 3, step=1)]
    assert others_at_fault(faults, faults[0]) == ["layer-2"]


def test_kinds_that_agree_before_a_fault_are_named() -> None:
    before = [Measurement(kind, 0, 0.0, 0.0, layer="a", layer_idx=0) for kind in ("initial weights", "output")]
    loss = Measurement("loss", 0, 0.0, 0.0)
    assert agreeing([*before, loss], fault("gradient", 1)) == ["initial weights", "outputs", "loss"]
    assert agreeing(before, fault("initial weights", 1)) == []
    later = Measurement("loss", 2, 0.0, 0.0)
    assert agreeing([*before, later], fault("gradient", 1, step=2)) == ["all of steps 1 to 2", "loss"]


def test_measurements_are_read_as_they_were_written(tmp_path: Path) -> None:
    found = [*CAUSES, Measurement("loss", 0, math.inf, math.inf, ranks=(1, 2), apart=("data",), note="is not there")]
    save_measurements(tmp_path / "m.json", found, boundaries=[0, 4, 8])
    assert load_measurements(tmp_path / "m.json") == (found, [0, 4, 8])
