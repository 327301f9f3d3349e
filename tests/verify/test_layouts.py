"""Layouts that are verified, and why others are not."""

from __future__ import annotations

import pytest

from pipekit.errors import LayoutError
from pipekit.layout import Layout
from pipekit.models.family import AttentionHeads
from pipekit.verify.layouts import (
    MAX_LAYOUTS,
    LayoutCandidate,
    LayoutLimits,
    parse_layouts,
    plan_candidates,
    reason_against,
)

FACTS = LayoutLimits(8, heads=AttentionHeads(4, 2), sequence_length=64, global_batch_size=8, micro_batch_size=2)


def names(num_devices: int, own: LayoutCandidate | None = None, zero: int = 1) -> list[str]:
    fitting, _ = plan_candidates(num_devices, FACTS, own=own, zero=zero)
    return [f"{candidate} ZeRO {candidate.zero}" for candidate in fitting]


def test_each_axis_comes_alone_and_with_the_others() -> None:
    assert names(1) == []
    assert names(2) == ["pp=2 ZeRO 1", "dp=2 ZeRO 1", "tp=2 ZeRO 1"]
    assert names(3)[:4] == ["pp=2 ZeRO 1", "dp=2 ZeRO 1", "tp=2 ZeRO 1", "pp=3 ZeRO 1"]
    on_eight = names(8)
    assert len(on_eight) == MAX_LAYOUTS
    assert on_eight[:7] == [
        f"{layout} ZeRO 1"
        for layout in (
            "pp=2", "dp=2", "tp=2", "pp=2 x dp=2", "pp=2 x tp=2", "dp=2 x tp=2", "pp=2 x dp=2 x tp=2",
        )
    ]  # fmt: skip
    assert on_eight[7] == "pp=4 ZeRO 1"


def test_the_layout_of_the_configuration_is_first_and_keeps_its_zero_stage() -> None:
    own = LayoutCandidate(Layout(pp=4), 0, is_configured=True)
    fitting, _ = plan_candidates(4, FACTS, own=own, zero=0)
    assert fitting[0] is own
    assert [candidate.layout for candidate in fitting].count(Layout(pp=4)) == 1


def test_a_pipeline_has_zero_1_at_most() -> None:
    assert names(2, zero=3) == ["pp=2 ZeRO 1", "dp=2 ZeRO 3", "tp=2 ZeRO 3"]


@pytest.mark.parametrize(
    ("layout", "part"),
    [
        (Layout(pp=2, dp=2, tp=2), "needs 8 processes, and there are 4"),
        (Layout(dp=3), "train.global_batch_size=8 is not a multiple of train.micro_batch_size=2 x dp=3"),
        (Layout(tp=3), "parallel.tp=3 does not divide model.num_heads=4"),
        (Layout(dp=4), None),
        (Layout(tp=4), None),
        (Layout(pp=4), None),
    ],
)
def test_a_layout_that_does_not_fit_has_a_reason(layout: Layout, part: str | None) -> None:
    reason = reason_against(layout, 4, FACTS)
    assert reason is None if part is None else part in str(reason)


def test_stages_heads_and_sequences_that_do_not_divide() -> None:
    assert "9 stages are more than the 8 layers" in str(reason_against(Layout(pp=9), 16, FACTS))
    odd = LayoutLimits(8, heads=AttentionHeads(12, 3), sequence_length=None, global_batch_size=8, micro_batch_size=2)
    assert "model.num_kv_heads=3: one must divide the other" in str(reason_against(Layout(tp=4), 16, odd))
    assert reason_against(Layout(tp=6), 16, odd) is None
    long = LayoutLimits(8, heads=None, sequence_length=30, global_batch_size=8, micro_batch_size=2)
    assert "4 does not divide train.sequence_length=30; tp=2 does" in str(reason_against(Layout(tp=4), 16, long))


def test_layouts_can_be_named() -> None:
    named = parse_layouts("pp2, pp=2 x dp=2,dp2xzero0,pp2", zero=3)
    assert [(str(candidate), candidate.zero) for candidate in named] == [("pp=2", 1), ("pp=2 x dp=2", 1), ("dp=2", 0)]


@pytest.mark.parametrize("text", ["", "pp", "pp2,", "qq2", "pp2xpp4", "2", "pp2*dp2"])
def test_layouts_that_cannot_be_read_say_what_to_type(text: str) -> None:
    with pytest.raises(LayoutError, match="for example --layouts pp2,dp2xzero0,pp2xdp2"):
        parse_layouts(text, zero=1)
