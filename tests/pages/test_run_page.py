"""The page of runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from html_pages import Page, check_is_closed
from pipekit.pages.run_page import describe, render_run_page, write_run_page
from pipekit.pages.run_record import RunRecord
from pipekit.schedules import Costs, plan_1f1b, simulate
from pipekit.step_profile.timelines import save_timelines


def write_run(folder: Path, records: list[dict[str, Any]], config: str = "train: {steps: 9}\n") -> Path:
    folder.mkdir()
    (folder / "config.yaml").write_text(config)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


def page_of(*runs: Path) -> Page:
    html = render_run_page([RunRecord.read(run) for run in runs])
    check_is_closed(html)
    return Page(html)


def chart(page: Page, title: str) -> dict[str, Any]:
    (found,) = (each for each in page.charts if each["title"] == title)
    return found


RECORDS = [
    {"step": 1, "loss": 3.0, "lr": 0.1, "grad_norm": 1.0, "tokens_per_s": 1000.0, "step_time_s": 0.5, "val_loss": 2.9},
    {"step": 2, "loss": 2.0, "lr": 0.2, "grad_norm": None, "tokens_per_s": 3000.0, "step_time_s": 1.5},
    {"step": 3, "loss": 1.5, "lr": 0.1, "grad_norm": 2.0, "tokens_per_s": 2000.0, "step_time_s": 70.0, "val_loss": 1.7},
]


def test_a_page_has_a_chart_for_each_metric_with_its_values(tmp_path: Path) -> None:
    page = page_of(write_run(tmp_path / "a", [*RECORDS, {"step": 3, "val_loss/code": 1.2, "val_accuracy": 0.5}]))
    titles = ["Loss", "Learning rate", "Gradient norm", "Tokens per second", "Time of a step", "accuracy"]
    assert [each["title"] for each in page.charts] == titles
    loss = chart(page, "Loss")
    assert {each["label"]: each["points"] for each in loss["series"]} == {
        "training loss": [[1, 3.0], [2, 2.0], [3, 1.5]],
        "validation loss": [[1, 2.9], [3, 1.7]],
        "validation loss/code": [[3, 1.2]],
    }
    assert [each["style"] for each in loss["series"]] == ["line", "dashed", "dashed"]
    # What is not finite leaves a gap.
    assert chart(page, "Gradient norm")["series"][0]["points"] == [[1, 1.0], [2, None], [3, 2.0]]
    for said in ("1.5", "1.7", "2.0 k", "72.0 s", "step 3 of 9", "train: {steps: 9}"):
        assert said in page.text, said


def test_runs_stand_side_by_side(tmp_path: Path) -> None:
    configs = [
        "optimizer: {lr: 0.1}\ntrain: {steps: 3, seed: 1}\n",
        "optimizer: {lr: 0.2}\ntrain: {steps: 3, seed: 1}\n",
    ]
    runs = [write_run(tmp_path / name, RECORDS, config) for name, config in zip("ab", configs, strict=True)]
    page = page_of(*runs)
    series = chart(page, "Loss")["series"]
    assert [(each["label"], each["colour"], each["style"]) for each in series] == [
        *(("a", 0, style) for style in ("line", "dashed")),
        *(("b", 1, style) for style in ("line", "dashed")),
    ]
    assert [each["in_legend"] for each in series] == [True, False, True, False]
    assert chart(page, "Loss")["notes"] == ["dashed: validation"]
    # The keys that differ, with their values, and no others.
    texts = [text for text in page.texts if text.strip()]
    first = texts.index("optimizer.lr")
    assert texts[first - 3 : first + 3] == ["key", "a", "b", "optimizer.lr", "0.1", "0.2"]
    assert "train.seed" not in page.texts


def test_losses_that_are_not_finite_are_said(tmp_path: Path) -> None:
    records = [{"step": step, "loss": None if step > 2 else 2.0} for step in range(1, 6)]
    page = page_of(write_run(tmp_path / "a", records))
    assert "loss is not a finite number at 3 steps, first at step 3" in page.text
    assert chart(page, "Loss")["series"][0]["points"][2:] == [[3, None], [4, None], [5, None]]
    none_is = page_of(write_run(tmp_path / "b", [{"step": 1, "loss": None}]))
    assert "loss is not a finite number at 1 step, first at step 1" in none_is.text
    assert none_is.charts == []


def test_a_run_without_metrics_has_a_page(tmp_path: Path) -> None:
    record = RunRecord.read(write_run(tmp_path / "a", []))
    page = Page(render_run_page([record]))
    assert "There are no metrics yet." in page.texts
    assert page.charts == []
    assert describe(record) == "interrupted, step 0 of 9"


def test_a_loss_with_a_spike_has_a_logarithmic_axis_and_a_mark(tmp_path: Path) -> None:
    run = write_run(tmp_path / "a", [{"step": step, "loss": 400.0 if step == 7 else 2.0} for step in range(1, 20)])
    (run / "spikes.jsonl").write_text(json.dumps({"step": 7, "loss": 400.0, "score": 99.0}) + "\n")
    loss = chart(page_of(run), "Loss")
    assert loss["logarithmic"]
    assert loss["series"][-1]["points"] == [[7, 400.0]]
    assert loss["series"][-1]["style"] == "dots"


@pytest.mark.parametrize("evil", ["<script>alert(1)</script>", "</script><img src=x onerror=y>", "]]>&amp;<!--"])
def test_text_is_escaped(tmp_path: Path, evil: str) -> None:
    run = write_run(tmp_path / "a", [{"step": 1, "loss": 1.0, evil: 2.0}], json.dumps({evil: evil}))
    for name, record in {
        "events": {"event": evil, "text": evil, "step": 1, "time": evil},
        "samples": {"prompt": evil, "text": evil, "step": evil},
        "evaluations": {"step": evil, "texts": [{"name": evil, "loss": 1.0}]},
    }.items():
        (run / f"{name}.jsonl").write_text(json.dumps(record) + "\n")
    page = page_of(run)
    assert [tag for tag, _ in page.tags].count("script") == 3
    assert "img" not in {tag for tag, _ in page.tags}
    assert page.text.count(evil) >= 6
    # After a slash comes the source of a metric.
    assert evil.partition("/")[0] in [each["title"] for each in page.charts]


def test_a_profiled_step_is_drawn_as_measured_and_as_planned_with_the_memory_of_ranks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipekit.step_profile.timelines.draw_picture", lambda *_: None)
    run = write_run(tmp_path / "a", RECORDS)
    schedule = plan_1f1b(num_stages=2, num_micro_batches=3)
    measured, planned = (simulate(schedule, Costs.uniform(2, forward_s=seconds)) for seconds in (0.2, 0.1))
    save_timelines(measured, planned, run / "profile" / "step-00000013")
    pairs = {"seconds_and_bytes": [[0.0, 5e6], [1.0, 8e6], [2.0, 3e6]]}
    (run / "profile/memory-rank-1.json").write_text(json.dumps(pairs))
    page = page_of(run)
    drawn = [each for each in page.charts if each["kind"] == "timeline"]
    for each, timeline in zip(drawn, (measured, planned), strict=True):
        spans = [span for series in each["series"] for span in series["spans"]]
        assert sorted(action for *_, action in spans) == sorted(
            str(span.action) for row in timeline.spans for span in row
        )
        assert max(end for _, _, end, _, _ in spans) == pytest.approx(timeline.step_time_s)
        assert each["end_s"] == measured.step_time_s, "both have one axis"
    (memory,) = (each for each in page.charts if each["kind"] == "bars")
    assert (memory["rows"], memory["series"][0]["values"]) == (["rank 1"], [8e6])


def test_every_metric_of_a_run_has_its_title_and_unit_and_the_peaks_of_ranks_share_a_chart(tmp_path: Path) -> None:
    peaks = {f"peak_memory_bytes_rank{rank}": (20 - rank) * 1e6 for rank in range(12)}
    totals = {"samples": 8, "tokens": 256, "flops": 7e7, "flops_per_s": 1e9, "mfu": 0.5}
    times = {"data_wait": 0.1, "data_wait_s": 0.01, "eval_time_s": 0.2, "save_time_s": 0.3}
    first = {**RECORDS[0], **totals, **times, **peaks, "peak_memory_bytes": 20e6}
    page = page_of(write_run(tmp_path / "a", [first, {"step": 2, "peak_memory_bytes_rank3": 30e6}]))
    curves = [each for each in page.charts if each["kind"] == "lines"]
    assert [each["title"] for each in curves if not each["title"][0].isupper() or "_" in each["title"]] == []
    assert {each["title"]: each["unit"] for each in curves}["Peak memory of the fullest rank"] == "bytes"
    (memory,) = (each for each in page.charts if each["kind"] == "bars")
    assert memory["rows"] == [f"rank {rank}" for rank in range(12)]
    assert memory["series"][0]["values"][:5] == [20e6, 19e6, 18e6, 30e6, 16e6]


@pytest.mark.parametrize("steps", [5000, pytest.param(100_000, marks=pytest.mark.slow)])
def test_a_page_of_many_steps_keeps_their_spikes_and_stays_small(tmp_path: Path, steps: int) -> None:
    losses = 2 + np.random.default_rng(0).normal(size=steps) / 10
    losses[4000] = 9.5
    names = ("loss", "lr", "grad_norm", "tokens_per_s", "step_time_s", "data_wait", "host_memory_bytes")
    run = write_run(
        tmp_path / "a", [{"step": step, **dict.fromkeys(names, loss)} for step, loss in enumerate(losses, 1)]
    )
    write_run_page([RunRecord.read(run)], run / "report.html")
    assert (run / "report.html").stat().st_size < 2e6
    points = chart(Page((run / "report.html").read_text()), "Loss")["series"][0]["points"]
    assert [4001, 9.5] in points
    assert len(points) < 2000


def test_speed_of_the_head_is_the_median_of_the_last_steps(tmp_path: Path) -> None:
    records = [{"step": step, "tokens_per_s": float(step)} for step in range(1, 301)]
    assert f"{np.median(np.arange(201, 301)):g}" in page_of(write_run(tmp_path / "a", records)).texts
