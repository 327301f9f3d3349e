"""Tables of a verification."""

from __future__ import annotations

import io
import json
import math
from typing import Any

from pipekit.commands.verify_tables import show_report
from pipekit.layout import Layout
from pipekit.training.console import make_console
from pipekit.verify.explain import LayoutContext
from pipekit.verify.layouts import LayoutCandidate
from pipekit.verify.measurement import Measurement
from pipekit.verify.report import Result, report

NAMES = ["embed", "block", "embed"]


def result(layout: Layout, *measurements: Measurement, failure: str = "") -> Result:
    context = LayoutContext(layout, NAMES, [0, 3], frozenset({"embed"}))
    return Result(LayoutCandidate(layout, 1), 1.5, () if failure else measurements, context, failure)


GOOD = (Measurement("loss", 0, 1e-7, 1e-3), Measurement("gradient", 0, 2e-7, 2e-3, layer="embed", layer_idx=0))
TWICE = Measurement(
    "gradient", 0, 1.0, 1e4, layer="embed", layer_idx=0, tensor="embed.weight", ranks=(0,), num_wrong=1, ratio=2.0,
    found=2.0, expected=1.0,
)  # fmt: skip


def verification(*results: Result) -> dict[str, Any]:
    return report(
        results,
        rejected=[(LayoutCandidate(Layout(tp=3), 1), "3 does not divide the 4 attention heads")],
        notes=["model.dropout=0.1 was set to 0"],
        model="tiny, 3 layers",
        device="cpu",
        precision="fp32",
        steps=3,
        global_batch_size=8,
        tolerance=1e-4,
    )


def shown(found: dict[str, Any]) -> str:
    stream = io.StringIO()
    show_report(found, make_console(stream))
    return stream.getvalue()


def test_layouts_that_agree() -> None:
    found = verification(result(Layout(pp=2), *GOOD), result(Layout(dp=2), *GOOD))
    assert found["agrees"]
    text = shown(found)
    assert "all 2 layouts train the same model as one process" in text
    assert "tp=3: 3 does not divide the 4 attention heads" in text
    assert "model.dropout=0.1 was set to 0" in text
    assert "1.0e-07" in text
    assert "because" not in text


def test_the_first_difference_is_shown_with_its_layer_and_cause() -> None:
    failed = result(Layout(tp=2), failure="rank 1 failed: [boom]\n  at [line] 3\n      ~~^^^\nValueError: [boom]")
    found = verification(result(Layout(pp=2), *GOOD), result(Layout(dp=2), GOOD[0], TWICE), failed)
    assert not found["agrees"]
    text = shown(found)
    assert "differs at embed" in text
    assert "differs first in the gradient of embed.weight, in step 1" in text
    assert "2 x that of one process" in text
    assert "counted twice" in text
    assert "ValueError: [boom]" in text
    assert "^" not in text
    assert text.endswith("dp=2 does not train the same model as one process; tp=2 failed; pp=2 does\n")


def test_the_report_is_json_without_infinities() -> None:
    missing = Measurement("output", 0, math.inf, math.inf, layer="block", layer_idx=1, note="is not there")
    found = verification(result(Layout(pp=2), missing), result(Layout(dp=2), failure="boom"))
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert [entry["verdict"] for entry in found["layouts"]] == ["differs", "failed"]
    difference = found["layouts"][0]["first_difference"]
    assert (difference["layer"], difference["error"], difference["by"]) == ("block", None, "is not there")
    assert found["layouts"][1]["failure"] == "boom"
    assert found["rejected"] == [
        {"layout": {"pp": 1, "dp": 1, "tp": 3, "zero": 1}, "reason": "3 does not divide the 4 attention heads"}
    ]
