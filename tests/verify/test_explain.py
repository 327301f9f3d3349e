"""Explanations of a difference."""

from __future__ import annotations

import pytest

from pipekit.layout import Layout
from pipekit.verify.explain import LayoutContext, describe, likely_cause, locate, quantify
from pipekit.verify.measurement import LOSS, Measurement, MeasurementKind

NAMES = ["embed", "block", "head"]


def context(**degrees: int) -> LayoutContext:
    boundaries = [0, 1, 3] if degrees.get("pp", 1) > 1 else [0, 3]
    return LayoutContext(Layout(**degrees), NAMES, boundaries, frozenset({"embed"}))


def fault(kind: MeasurementKind, layer: str | None = "block", **fields: object) -> Measurement:
    layer_idx = -1 if layer is None else [*NAMES, LOSS].index(layer)
    return Measurement(kind, fields.pop("step", 0), 0.5, 5e3, layer=layer, layer_idx=layer_idx, **fields)  # type: ignore


@pytest.mark.parametrize(
    ("found", "degrees", "words"),
    [
        (fault("initial weights"), {"pp": 2}, "does not follow from train.seed and its name alone"),
        (fault("output"), {"dp": 2}, "so does what embed passes to it; likely random numbers"),
        (fault("output"), {"pp": 2}, "or what came over from the stage before"),
        (fault("output", "embed"), {"tp": 2}, "its weights agree; likely a sum over the tensor-parallel ranks"),
        (fault("output", apart=("tensor",)), {"tp": 2}, "return different results, which were not summed or gathered"),
        (fault("output", note="is (4, 5), and (4, 6) in one process"), {"tp": 2}, "the shape of what it returns"),
        (fault("loss", None), {"dp": 2}, "every layer returns what it does in one process"),
        (fault("loss", None, step=2), {"dp": 2}, "all that was compared before step 3 agrees"),
        (fault("input gradient"), {"tp": 2}, "copy_to_shards"),
        (fault("input gradient"), {"pp": 2}, "or what went back over to the stage before"),
        (fault("input gradient", LOSS), {"dp": 2}, "the backward of the loss function"),
        (fault("gradient", apart=("data",)), {"dp": 2}, "not averaged over parallel.dp"),
        (fault("gradient", "embed", apart=("pipe",)), {"pp": 2}, "not summed over the stages that share it"),
        (fault("gradient", apart=("tensor",)), {"tp": 2}, "mark_partial_gradient"),
        (fault("gradient", "embed", ratio=2.0), {"pp": 2}, "it is counted twice: embed is tied"),
        (fault("gradient", ratio=4.0), {"dp": 4}, "it is counted 4 times (parallel.dp is 4)"),
        (fault("gradient", ratio=0.5), {"dp": 2}, "it is divided by 2, or so much of it is not counted (parallel.dp"),
        (fault("gradient", "embed"), {"pp": 2}, "what its copies add to the gradient is not summed"),
        (fault("gradient", step=1), {"dp": 2}, "gradients of the step before were not cleared"),
        (fault("gradient"), {"dp": 2}, "likely a hook on the parameter"),
        (fault("gradient norm", None), {"pp": 2}, "counted more than once in the norm"),
        (fault("weights", apart=("data",)), {"dp": 2}, "the replicas have made different updates"),
        (fault("weights", "embed", apart=("pipe",)), {"pp": 2}, "the stages that share it"),
        (fault("weights", ratio=0.5), {"dp": 2}, "likely a learning rate"),
        (fault("weights"), {"dp": 2}, "an optimizer whose update of an element depends on other elements"),
    ],
)
def test_each_difference_has_its_usual_cause(found: Measurement, degrees: dict[str, int], words: str) -> None:
    assert words in likely_cause(found, context(**degrees))


def test_a_difference_is_described() -> None:
    assert describe(fault("weights", tensor="block.weight", step=1)) == (
        "the weights of block.weight after the update of step 2"
    )
    assert describe(fault("input gradient", tensor="[1]", micro_batch=0)) == (
        "the input gradient of block[1], in step 1, for micro-batch 0"
    )
    assert describe(fault("gradient norm", None)) == "the gradient norm, in step 1"


def test_how_much_it_is_off_is_said() -> None:
    assert quantify(fault("gradient", ratio=0.25)) == "0.25 x that of one process"
    assert quantify(fault("weights", ratio=0.25)) == "changed by 0.25 x that of one process"
    assert quantify(fault("output", note="is not there")) == "is not there"
    assert quantify(fault("output", found=1.5, expected=1.0, share=0.25)) == (
        "off by 50 % of its norm, in 25 % of its elements: one is 1.5, and 1 in one process"
    )


def test_ranks_are_named() -> None:
    everywhere = fault("gradient", ranks=(0, 1, 2, 3), num_copies=4, num_wrong=4)
    assert locate(everywhere, context(dp=4)) == "ranks 0, 1, 2, 3; all 4 copies are off"
    assert locate(fault("output", ranks=(3,)), context(pp=4)) == "rank 3"
    assert locate(fault("gradient", ranks=(1, 2), num_copies=4, num_wrong=2), context(dp=4)) == (
        "ranks 1, 2; 2 of the 4 copies are off"
    )
    assert locate(fault("output", ranks=(0,)), context()) == ""
