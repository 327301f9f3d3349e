"""Page of one run, or of several side by side: curves, timelines, what happened, checkpoints, texts, configuration."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pipekit.files import write_atomically
from pipekit.line_files import utc_now
from pipekit.number_text import seconds_text
from pipekit.pages.charts import bars_height, line, rank_names, timeline_chart
from pipekit.pages.render import render
from pipekit.pages.run_record import Event, RunRecord
from pipekit.pages.thin import thin, trend
from pipekit.plan.train_result import Series
from pipekit.settings.dotted import dotted_items
from pipekit.storage import storing

_KNOWN: dict[str, tuple[str, str]] = {
    "loss": ("Loss", "number"),
    "lr": ("Learning rate", "number"),
    "grad_norm": ("Gradient norm", "number"),
    "tokens_per_s": ("Tokens per second", "count"),
    "samples_per_s": ("Samples per second", "count"),
    "step_time_s": ("Time of a step", "seconds"),
    "mfu": ("Model FLOPs utilization", "percent"),
    "flops_per_s": ("Floating-point operations per second", "count"),
    "data_wait": ("Share of a step spent waiting for data", "percent"),
    "data_wait_s": ("Time of a step spent waiting for data", "seconds"),
    "peak_memory_bytes": ("Peak memory of the fullest rank", "bytes"),
    "host_memory_bytes": ("Host memory of a process", "bytes"),
    "device_peak_bytes": ("Device memory at its peak", "bytes"),
    "eval_time_s": ("Time of an evaluation", "seconds"),
    "save_time_s": ("Pause for a checkpoint", "seconds"),
    "samples": ("Samples so far", "count"),
    "tokens": ("Tokens so far", "count"),
    "flops": ("Floating-point operations so far", "number"),
}
"""Metrics with the titles and the units of their charts, in the order of the page; others follow under their names."""

_MAY_BE_LOGARITHMIC = ("loss", "grad_norm")
_VALIDATION = "val_"
# Bars of all ranks say more than a chart of each.
_PEAK_OF_RANK = re.compile(r"peak_memory_bytes_rank(\d+)")
# All curves of a page have so many points together, which take some 20 bytes each.
_MOST_POINTS = 40_000
_FEWEST_POINTS, _USUAL_POINTS = 60, 1200
_TREND_POINTS = 120
_MOST_EVENTS, _MOST_SAMPLES = 400, 24
_MOST_ACTIONS = 3000


def write_run_page(records: Sequence[RunRecord], path: Path) -> None:
    """Write the page of runs. A reader never sees half of it.

    Raises:
        StorageError: if it cannot be written.
    """
    text = render_run_page(records)
    with storing(path):
        write_atomically(path, text)


def render_run_page(records: Sequence[RunRecord]) -> str:
    """HTML of the page of one run, or of several, whose curves share their charts."""
    charts = list(_curve_charts(records))
    timelines = [_timelines(record) for record in records]
    peaks = [_memory_chart(record) for record in records]
    drawn = [*charts]
    for parts in (*(each["charts"] for each in timelines if each), peaks):
        drawn += [chart for chart in parts if chart is not None]
    for number, chart in enumerate(drawn):
        chart["number"] = number
    return render(
        "run.html",
        records=records,
        title=", ".join(record.name for record in records),
        written=_when(utc_now()),
        facts=[_facts(record) for record in records],
        curves=charts,
        timelines=timelines,
        peaks=peaks,
        charts=drawn,
        events=[_shown_events(record) for record in records],
        samples=[_shown_samples(record) for record in records],
        evaluations=[list(_evaluations(record)) for record in records],
        differences=_differences(records),
    )


def describe(record: RunRecord) -> str:
    """Run in one line.

    Its state, its step, and its last training and validation losses.
    """
    facts = _facts(record)
    losses = [f"{name} {facts[key]:.4g}" for name, key in (("loss", "loss"), ("val_loss", "val_loss")) if facts[key]]
    return ", ".join([facts["state"], facts["progress"], *losses])


def _facts(record: RunRecord) -> dict[str, Any]:
    """Figures at the head of the page; None for what is not known."""
    result, plan = record.result, record.plan
    total = record.num_steps
    layout = plan.get("layout") if isinstance(plan.get("layout"), Mapping) else None
    step_times = result.metrics.get("step_time_s")
    speeds = result.metrics.get("tokens_per_s", result.metrics.get("samples_per_s"))
    validation = result.validation_losses
    return {
        "state": record.state,
        "progress": f"step {result.step:,}" + ("" if total is None else f" of {total:,}"),
        "loss": _last(result.losses),
        "val_loss": _last(validation),
        "best": None if not np.isfinite(validation.values).any() else float(np.nanmin(validation.values)),
        "speed": None if speeds is None else float(np.nanmedian(speeds.values[-100:])),
        "speed_unit": "tokens per second" if "tokens_per_s" in result.metrics else "samples per second",
        "time": None if step_times is None else _duration(float(np.nansum(step_times.values))),
        "parameters": plan.get("num_parameters"),
        "layout": None if layout is None else ", ".join(f"{axis} {layout.get(axis)}" for axis in ("pp", "tp", "dp")),
        "precision": plan.get("precision"),
        "not_finite": _not_finite(record),
    }


def _duration(seconds: float) -> str:
    """Time as people say it.

    Example:
        >>> _duration(42.3), _duration(200), _duration(340_000)
        ('42.3 s', '3 min', '94 h 26 min')
    """
    if seconds < 120:
        return seconds_text(seconds)
    hours, minutes = divmod(int(seconds // 60), 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"


def _last(series: Series) -> float | None:
    finite = series.values[np.isfinite(series.values)]
    return float(finite[-1]) if len(finite) else None


def _not_finite(record: RunRecord) -> list[str]:
    """Metrics of losses with values that are not finite, in words."""
    found = []
    for name, series in record.result.metrics.items():
        is_bad = ~np.isfinite(series.values)
        if "loss" in name and is_bad.any():
            first = int(series.steps[is_bad.argmax()])
            times = int(is_bad.sum())
            found.append(f"{name} is not a finite number at {times:,} step{'s'[: times > 1]}, first at step {first:,}")
    return found


def _curve_charts(records: Sequence[RunRecord]) -> Iterator[dict[str, Any]]:
    """Charts of all metrics. Training and validation of a metric share one, and those of its sources where one run is
    shown."""
    several = len(records) > 1
    names: dict[str, list[str]] = {}
    for name in dict.fromkeys(name for record in records for name in record.result.metrics):
        if not _PEAK_OF_RANK.fullmatch(name) and any(_is_finite(record, name) for record in records):
            key = name.removeprefix(_VALIDATION) if several else name.removeprefix(_VALIDATION).partition("/")[0]
            names.setdefault(key, []).append(name)
    keys = [key for key in _KNOWN if key in names] + sorted(key for key in names if key not in _KNOWN)
    num_curves = max(1, len(records) * sum(map(len, names.values())))
    most = max(_FEWEST_POINTS, min(_USUAL_POINTS, _MOST_POINTS // num_curves))
    for key in keys:
        title, unit = _KNOWN.get(key, (key, "number"))
        is_logarithmic = key in _MAY_BE_LOGARITHMIC and _spans_decades(records, names[key])
        notes = ["logarithmic"] if is_logarithmic else []
        notes += ["dashed: validation"] if several and any(name.startswith(_VALIDATION) for name in names[key]) else []
        curves = [curve for run in range(len(records)) for curve in _curves(records, run, names[key], most)]
        yield {
            "kind": "lines",
            "title": title,
            "unit": unit,
            "notes": notes,
            "logarithmic": is_logarithmic,
            "series": curves,
        }


def _is_finite(record: RunRecord, name: str) -> bool:
    return name in record.result.metrics and bool(np.isfinite(record.result.metrics[name].values).any())


def _curves(records: Sequence[RunRecord], run: int, names: Sequence[str], most: int) -> Iterator[dict[str, Any]]:
    """Curves of one run in a chart: several runs differ in colour, and the metrics of a single one do."""
    record, several = records[run], len(records) > 1
    shown = [name for name in names if _is_finite(record, name)]
    for index, name in enumerate(shown):
        series, is_validation = record.result.metrics[name], name.startswith(_VALIDATION)
        colour = run if several else index
        label = record.name if several else _words(name)
        # One entry of the legend for each run.
        in_legend = index == 0 or not several
        if is_validation or len(series) <= 2 * _TREND_POINTS:
            style = "dashed" if is_validation else "line"
            yield line(label, thin(series, most), colour=colour, style=style, in_legend=in_legend)
            continue
        yield line(label, thin(series, most), colour=colour, style="faint", in_legend=False)
        yield line(label, trend(series, _TREND_POINTS), colour=colour, style="trend", in_legend=in_legend)
    if record.spikes and "loss" in names:
        steps, losses = zip(*record.spikes, strict=True)
        dots = thin(Series(np.array(steps), np.array(losses, float)), 200)
        yield line("spikes", dots, colour=run if several else None, style="dots", in_legend=not several)


def _words(name: str) -> str:
    return f"validation {name.removeprefix(_VALIDATION)}" if name.startswith(_VALIDATION) else f"training {name}"


def _spans_decades(records: Sequence[RunRecord], names: Sequence[str]) -> bool:
    """True if values are positive and so far apart that a linear axis would show the smaller ones as one line."""
    found = [
        record.result.metrics[name].values for record in records for name in names if name in record.result.metrics
    ]
    values = np.concatenate(found)
    values = values[np.isfinite(values)]
    return bool(len(values) and values.min() > 0 and values.max() > 30 * np.median(values))


def _timelines(record: RunRecord) -> dict[str, Any] | None:
    """Charts of the newest profiled step, measured and planned, on one axis."""
    found = record.timelines
    if found is None:
        return None
    if sum(map(len, (*found.measured, *found.planned))) > _MOST_ACTIONS:
        return {"step": found.step, "charts": [], "captions": [], "is_too_long": True}
    end_s = max((end for row in (*found.measured, *found.planned) for _, _, end in row), default=0.0)
    charts, captions = [], []
    for name, rows in (("measured", found.measured), ("planned", found.planned)):
        charts.append(timeline_chart(rows, title=f"{record.name}: step {found.step}, {name}", end_s=end_s))
        captions.append((name, found.step_time_s[name], found.bubble_fraction[name]))
    width = max(chart["width"] for chart in charts)
    charts = [{**chart, "width": width} for chart in charts]
    return {"step": found.step, "charts": charts, "captions": captions, "is_too_long": False}


def _memory_chart(record: RunRecord) -> dict[str, Any] | None:
    """Bars of the ranks' memory at its peak, in a profiled step, or in all steps if none was profiled for it."""
    peaks: Mapping[int, float] = record.memory_peaks or {
        int(found[1]): float(np.nanmax(series.values))
        for name, series in record.result.metrics.items()
        if (found := _PEAK_OF_RANK.fullmatch(name)) and _is_finite(record, name)
    }
    if not peaks:
        return None
    ranks = sorted(peaks)[:64]
    return {
        "kind": "bars",
        "title": f"{record.name}: memory of the ranks at its peak",
        "unit": "bytes",
        "rows": rank_names(ranks),
        "height": bars_height(len(ranks)),
        "series": [{"label": "peak", "colour": "#3D8FC4", "values": [peaks[rank] for rank in ranks]}],
    }


def _shown_events(record: RunRecord) -> dict[str, Any]:
    """The newest events, the last first; those that come often are counted where there are too many."""
    events: list[Event] = list(record.events)
    if len(events) > _MOST_EVENTS:
        events = [each for each in events if each.kind != "checkpoint"]
    shown = events[-_MOST_EVENTS:]
    return {
        "rows": [(_when(each.time), each.step, each.kind, each.text) for each in reversed(shown)],
        "num_left_out": len(record.events) - len(shown),
    }


def _when(time: str) -> str:
    """Time in ISO format as people read it.

    Example:
        >>> _when("2026-11-27T08:30:05+00:00")
        '2026-11-27 08:30:05'
    """
    return time.replace("T", " ").partition("+")[0]


def _shown_samples(record: RunRecord) -> list[Mapping[str, Any]]:
    return [each for each in reversed(record.samples) if {"step", "prompt", "text"} <= each.keys()][:_MOST_SAMPLES]


def _evaluations(record: RunRecord) -> Iterator[tuple[int | None, str, str]]:
    """Step, text or task, and numbers of each evaluation."""
    for each in record.evaluations:
        for text in each.get("texts") or []:
            shown = {key: text.get(key) for key in ("loss", "perplexity", "bits_per_byte")}
            yield each.get("step"), str(text.get("name")), _numbers(shown)
        for task, metrics in (each.get("tasks") or {}).items():
            yield each.get("step"), str(task), _numbers(metrics)


def _numbers(values: Any) -> str:
    if not isinstance(values, Mapping):
        return ""
    shown = {key: value for key, value in values.items() if isinstance(value, (int, float)) and math.isfinite(value)}
    return ", ".join(f"{key} {value:.4g}" for key, value in shown.items())


def _differences(records: Sequence[RunRecord]) -> list[tuple[str, list[str]]]:
    """Keys whose values are not the same in the configurations of all runs, with the values."""
    flat = [
        {key: "null" if value is None else str(value) for key, value in dotted_items(record.config)}
        for record in records
    ]
    keys = {key: None for each in flat for key in each}
    rows = [(key, [each.get(key, "-") for each in flat]) for key in keys]
    return [(key, values) for key, values in rows if len(set(values)) > 1 and key != "run.dir"]
