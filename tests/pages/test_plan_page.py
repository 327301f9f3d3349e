"""The page of a predicted run."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest

from html_pages import Page, check_is_closed
from pipekit.pages.plan_page import render_html
from pipekit.schedules import Costs, Schedule, plan_1f1b, simulate

PARTS = ("weights", "gradients", "masters", "optimizer_states", "activations", "communication", "logits")
LAYOUT = {
    "pp": 2,
    "tp": 1,
    "dp": 4,
    "zero": 1,
    "schedule": "1f1b",
    "micro_batch_size": 2,
    "num_micro_batches": 4,
    "activation_checkpointing": False,
}


def spans_of(schedule: Schedule) -> list[list[dict[str, Any]]]:
    timeline = simulate(schedule, Costs.uniform(schedule.num_stages, forward_s=0.01))
    return [
        [{"action": str(span.action), "start_s": span.start_s, "end_s": span.end_s} for span in row]
        for row in timeline.spans
    ]


def stage(rank: int, total_bytes: float, *layers: list[Any]) -> dict[str, Any]:
    memory = {part: total_bytes / len(PARTS) for part in PARTS}
    return {
        "rank": rank,
        "layers": list(layers),
        "parameters": 62_000_000 + rank,
        "memory_bytes": {**memory, "total": total_bytes},
        "time_s": 0.0125,
    }


REPORT: dict[str, Any] = {
    "parameters": 124_439_808,
    "layout": LAYOUT,
    "device": {"name": "a100-80gb", "memory_bytes": 80_000_000_000, "usable_bytes": 80_000_000_000},
    "step_time_s": 0.25,
    "tokens_per_s": 131_072.0,
    "tflops_per_device": 151.5,
    "bubble_fraction": 0.2,
    "stages": [
        stage(0, 60e9, [0, 6, "embedding", "block.5"]),
        stage(1, 20e9, [7, 12, "block.6", "block.11"], [13, 13, "head", "head"]),
    ],
    "timeline": spans_of(plan_1f1b(num_stages=2, num_micro_batches=4)),
    "layouts": [
        {
            "layout": LAYOUT,
            "tokens_per_s": 131_072.0,
            "step_time_s": 0.25,
            "memory_bytes": 60e9,
            "bubble_fraction": 0.2,
        },
        {
            "layout": {**LAYOUT, "pp": 4, "dp": 2, "schedule": "zb-h1"},
            "tokens_per_s": 120_000.0,
            "step_time_s": 0.27,
            "memory_bytes": 30e9,
            "bubble_fraction": 0.3,
        },
    ],
    "rejected": [{"layout": {**LAYOUT, "pp": 1, "dp": 8}, "reason": "rank 0 needs 96.0 GB of 80.0 GB"}],
}


def changed(**keys: Any) -> dict[str, Any]:
    return {**copy.deepcopy(REPORT), **keys}


def test_a_page_is_well_formed_and_says_everything() -> None:
    page = Page(render_html(REPORT))
    assert page.open == []
    for said in (
        "124.4 M parameters on a100-80gb, pp 2, tp 1, dp 4",
        "0 to 6: embedding to block.5", "7 to 12: block.6 to block.11", "13 head",
        "131.1 k", "250 ms", "151.5", "20 %", "60.0 GB, 75 %", "12.5 ms", "zb-h1", "rank 0 needs 96.0 GB of 80.0 GB",
    ):  # fmt: skip
        assert said in page.text, said
    assert [tag for tag, _ in page.tags].count("h1") == 1


def test_a_whole_run_has_its_days_hours_and_cost() -> None:
    run = {"tokens": 300_000_000_000, "days": 12.34, "device_hours": 303_350.6, "cost": 758_376.5}
    texts = Page(render_html(changed(run=run))).texts
    first = texts.index("time for 300.0 B tokens")
    shown = [text for text in texts[first:] if text.strip()][:6]
    assert shown == ["time for 300.0 B tokens", "12.3 days", "device hours", "303,351", "cost", "758,376"]
    del run["cost"]
    without = Page(render_html(changed(run={**run, "days": 0.34}))).texts
    assert "8.2 hours" in without
    assert "cost" not in without
    assert "device hours" not in Page(render_html(REPORT)).texts


def test_a_page_loads_nothing() -> None:
    check_is_closed(render_html(REPORT))


def test_the_memory_of_ranks_is_drawn_by_its_parts_beside_the_limit() -> None:
    chart = Page(render_html(REPORT)).charts[0]
    assert chart["rows"] == ["rank 0", "rank 1"]
    assert chart["limit"] == 80e9
    assert [series["label"] for series in chart["series"]][2:4] == ["fp32 masters", "optimizer states"]
    for rank, total in enumerate((60e9, 20e9)):
        assert sum(series["values"][rank] for series in chart["series"]) == pytest.approx(total)


@pytest.mark.parametrize("evil", ["<script>alert(1)</script>", '"><img src=x onerror=y>', "a & b", "</title></style>"])
def test_text_is_escaped(evil: str) -> None:
    report = changed(
        device={"name": evil, "memory_bytes": 80e9, "usable_bytes": 80e9},
        stages=[stage(0, 60e9, [0, 1, evil, evil])],
        layout={**LAYOUT, "schedule": evil},
        rejected=[{"layout": {**LAYOUT, "schedule": evil, evil: evil}, "reason": evil}],
    )
    report["layouts"][0]["layout"] = {evil: evil}
    html = render_html(report)
    check_is_closed(html)
    page = Page(html)
    assert [tag for tag, _ in page.tags].count("script") == 3
    assert "img" not in {tag for tag, _ in page.tags}
    assert page.text.count(evil) >= 8


@pytest.mark.parametrize("key", ["timeline", "layouts", "rejected"])
@pytest.mark.parametrize("empty", [True, False])
def test_parts_may_be_absent(key: str, empty: bool) -> None:
    report = changed(**{key: []})
    if not empty:
        del report[key]
    heading = {"timeline": "Timeline of a step", "layouts": "Layouts", "rejected": "Rejected layouts"}[key]
    page = Page(render_html(report))
    assert heading not in page.texts
    assert heading in Page(render_html(REPORT)).texts
    assert "Stages" in page.texts


def test_figures_that_are_not_known_are_dashes() -> None:
    page = Page(render_html(changed(tflops_per_device=None, tokens_per_s=None)))
    assert page.texts.count("-") == 2


def test_memory_beyond_the_limit_is_said() -> None:
    html = render_html(changed(stages=[stage(0, 100e9, [0, 0, "a", "a"])]))
    assert '100.0 GB, 125 %<span class="bad">, 20.0 GB too much</span>' in html
    assert "too much" not in render_html(REPORT)


def test_a_cut_timeline_says_so() -> None:
    assert "Only the first" not in render_html(REPORT)
    assert "Only the first 4 of 512 micro-batches" in render_html(changed(layout={**LAYOUT, "num_micro_batches": 512}))


def test_the_layout_that_is_shown_is_marked_among_the_others() -> None:
    rows = re.findall(r'<tr class="here">(.*?)</tr>', render_html(REPORT), re.DOTALL)
    assert len(rows) == 1
    assert "<td>1</td><td>2</td><td>1</td><td>4</td>" in rows[0]


def test_every_action_of_the_timeline_is_there_with_its_times() -> None:
    (chart,) = (each for each in Page(render_html(REPORT)).charts if each["kind"] == "timeline")
    drawn = [
        (chart["rows"][row], action, start_s, end_s, micro_batch)
        for series in chart["series"]
        for row, start_s, end_s, micro_batch, action in series["spans"]
    ]
    planned = [
        (f"rank {rank}", span["action"], *map(pytest.approx, (span["start_s"], span["end_s"])), span["action"][2:])
        for rank, row in enumerate(REPORT["timeline"])
        for span in row
    ]
    assert sorted(drawn, key=str) == sorted(planned, key=str)
    assert [series["label"] for series in chart["series"]] == ["forward", "backward"]
    assert chart["end_s"] == pytest.approx(max(span["end_s"] for row in REPORT["timeline"] for span in row))
