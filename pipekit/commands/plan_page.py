"""A predicted run as one page of HTML that opens anywhere: styles and pictures inside, nothing loaded, no scripts."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape
from typing import Any

from pipekit.commands.figures import bytes_text, count_text, seconds_text
from pipekit.schedules.action import ACTION_NAMES, Action
from pipekit.schedules.draw import ACTION_COLOURS, ink_on, shade

_MEMORY_PARTS: dict[str, tuple[str, str]] = {
    "weights": ("weights", "#0072B2"),
    "gradients": ("gradients", "#56B4E9"),
    "masters": ("fp32 masters", "#009E73"),
    "optimizer_states": ("optimizer states", "#F0B429"),
    "activations": ("activations", "#E8743B"),
    "communication": ("communication", "#CC79A7"),
    "logits": ("logits", "#8A8A8A"),
    "update": ("reduction and update", "#7B5EA7"),
}
"""The parts of a rank's memory in the order of their bars: what each is called, and its colour (Okabe and Ito 2008)."""

_LAYOUT_KEYS: dict[str, str] = {
    "pp": "pp",
    "tp": "tp",
    "dp": "dp",
    "order": "order",
    "zero": "ZeRO",
    "schedule": "schedule",
    "stages_per_rank": "stages per rank",
    "micro_batch_size": "micro-batch size",
    "num_micro_batches": "micro-batches",
    "activation_checkpointing": "checkpointing",
}
"""The keys of a layout, and what stands above their columns."""

_STYLE = """
:root { color-scheme: light dark; --page: #ffffff; --ink: #1a1a1a; --soft: #5c5c5c; --line: #d9d9d9; --panel: #f4f4f4;
  --bad: #b3261e; --here: #fff3d6; }
@media (prefers-color-scheme: dark) { :root { --page: #16181c; --ink: #e8e8e8; --soft: #a5a9b0; --line: #3a3e46;
  --panel: #22252b; --bad: #ff8a80; --here: #3b3420; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1360px; padding: 1rem; background: var(--page); color: var(--ink);
  font: 15px/1.45 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
h1 { font-size: 1.5rem; line-height: 1.2; margin: .5rem 0 .25rem; overflow-wrap: anywhere; }
h2 { font-size: 1.1rem; margin: 2rem 0 .5rem; }
p { margin: .25rem 0 .75rem; color: var(--soft); }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(8.5rem, 1fr)); gap: .5rem; margin: 1rem 0; }
.figures div { background: var(--panel); border-radius: 6px; padding: .5rem .75rem; }
.figures dt { color: var(--soft); font-size: .8rem; }
.figures dd { margin: 0; font-size: 1.2rem; font-weight: 600; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .6rem; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
th { color: var(--soft); font-weight: 600; font-size: .85rem; vertical-align: bottom; }
td.text, th.text { text-align: left; }
td.text { white-space: normal; overflow-wrap: anywhere; min-width: 6rem; }
tr.here td { background: var(--here); font-weight: 600; }
.bad { color: var(--bad); font-weight: 600; }
.legend { list-style: none; display: flex; flex-wrap: wrap; gap: .25rem 1rem; margin: .25rem 0 .75rem; padding: 0;
  font-size: .85rem; }
.legend svg { width: .8rem; height: .8rem; margin-right: .35rem; vertical-align: -.08rem; }
.memory { display: grid; grid-template: "rank bar total" / 4.5rem 1fr 17rem; gap: 0 .6rem; align-items: center;
  margin: .35rem 0; font-variant-numeric: tabular-nums; }
.memory .rank { grid-area: rank; }
.memory .total { grid-area: total; }
.memory svg { grid-area: bar; width: 100%; height: 22px; display: block; background: var(--panel); }
.memory .limit { stroke: var(--ink); stroke-width: 2; stroke-dasharray: 3 2; }
.timeline { display: block; width: 100%; height: auto; }
.timeline .row { fill: var(--panel); }
.timeline text { font-size: 11px; fill: var(--soft); }
.timeline .tick { stroke: var(--line); }
summary { cursor: pointer; color: var(--soft); margin: .25rem 0; }
@media (max-width: 520px) { body { padding: .6rem; font-size: 14px; }
  th, td { padding: .25rem .35rem; } th { white-space: normal; font-size: .75rem; }
  .memory { grid-template: "rank total" "bar bar" / auto 1fr; margin: .6rem 0; } .memory .total { text-align: right; } }
@media print { body { max-width: none; } .scroll { overflow: visible; } }
"""

_MARGIN = 56  # what the rank's name takes, in the units of the timeline's picture
_ROW, _GAP = 26, 4
_CHARACTER_WIDTH = 6.4  # of a number of 11 units height


def render_html(report: Mapping[str, Any]) -> str:
    """Return a page that shows a predicted run.

    Args:
        report: what `--json` gives: `parameters`, `layout`, `device`, `step_time_s`, `tokens_per_s`,
            `tflops_per_device`, `bubble_fraction` and `stages`; `timeline`, `layouts` and `rejected` where they are
            there. What is None is shown as a dash.

    Example:
        >>> page = render_html({"parameters": 124e6, "layout": {"pp": 1}, "device": {"name": "h100", "memory_bytes":
        ...     80e9}, "step_time_s": 0.5, "tokens_per_s": 1e5, "tflops_per_device": 300.0, "bubble_fraction": 0.0,
        ...     "stages": []})
        >>> "<dd>124.0 M</dd>" in page, "<script" in page
        (True, False)
    """
    title = (
        f"{count_text(report['parameters'])} parameters on {report['device']['name']}, {_layout(report['layout'], 3)}"
    )
    sections = [
        f"<h1>{escape(title)}</h1>",
        f"<p>{escape(_layout(report['layout']))}</p>",
        _figures(report),
        _stages(report),
        _memory(report),
        _timeline(report),
        _layouts(report),
        _rejected(report),
    ]
    body = "\n".join(section for section in sections if section)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">\n"
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n{body}\n</body>\n</html>\n"
    )


def _figures(report: Mapping[str, Any]) -> str:
    limit_bytes = report["device"]["memory_bytes"]
    totals = [stage["memory_bytes"]["total"] for stage in report["stages"]]
    figures = {
        "parameters": _shown(report["parameters"], count_text),
        "step": _shown(report["step_time_s"], seconds_text),
        "tokens per second": _shown(report["tokens_per_s"], count_text),
        "TFLOP/s per device": _shown(report["tflops_per_device"], "{:.4g}".format),
        "bubble": _shown(report["bubble_fraction"], _percent),
    }
    if totals:
        figures["most memory of a rank"] = f"{bytes_text(max(totals))}, {_percent(max(totals) / limit_bytes)}"
    rows = "".join(f"<div><dt>{name}</dt><dd>{escape(figure)}</dd></div>" for name, figure in figures.items())
    return f'<dl class="figures">{rows}</dl>'


def _stages(report: Mapping[str, Any]) -> str:
    if not report["stages"]:
        return ""
    rows = [
        [
            str(stage["rank"]),
            _shown(stage["parameters"], count_text),
            _shown(stage["time_s"], seconds_text),
            bytes_text(stage["memory_bytes"]["total"]),
            "<br>".join(escape(_layer_range(*layers)) for layers in stage["layers"]),
        ]
        for stage in report["stages"]
    ]
    heads = ["rank", "parameters", "time", "memory", "layers"]
    return f"<h2>Stages</h2>\n{_table(heads, rows, texts={'layers'})}"


def _at_peak(parts: Mapping[str, float]) -> dict[str, float]:
    """Return the parts that are there when a rank holds most.

    The update's stands alone when what micro-batches take is gone again, so that the larger of the two counts.

    Example:
        >>> _at_peak({"weights": 4, "activations": 3, "logits": 2, "update": 6, "total": 10})
        {'weights': 4, 'update': 6}
    """
    passing = ("activations", "communication", "logits")
    absent = passing if parts.get("update", 0) > sum(parts.get(part, 0) for part in passing) else ("update",)
    return {part: parts[part] for part in _MEMORY_PARTS if parts.get(part, 0) > 0 and part not in absent}


def _layer_range(first: int, last: int, first_name: str, last_name: str) -> str:
    return f"{first} {first_name}" if first == last else f"{first} to {last}: {first_name} to {last_name}"


def _memory(report: Mapping[str, Any]) -> str:
    """Return a bar for each rank when it holds most; positions in per cent, so that bars fit any screen."""
    if not report["stages"]:
        return ""
    limit_bytes = report["device"]["memory_bytes"]
    scale = 98 / max(limit_bytes, *(stage["memory_bytes"]["total"] for stage in report["stages"]))
    rows, seen = [], set()
    for stage in report["stages"]:
        total = stage["memory_bytes"]["total"]
        boxes, start = [], 0.0
        for part, size in _at_peak(stage["memory_bytes"]).items():
            seen.add(part)
            name, colour = _MEMORY_PARTS[part]
            boxes.append(
                f'<rect x="{start * scale:.3f}%" width="{size * scale:.3f}%" height="100%" fill="{colour}">'
                f"<title>{name} {bytes_text(size)}</title></rect>"
            )
            start += size
        at = limit_bytes * scale
        boxes.append(f'<line class="limit" x1="{at:.3f}%" x2="{at:.3f}%" y1="0" y2="100%"/>')
        look, over = (
            ("total bad", f", {bytes_text(total - limit_bytes)} too much") if total > limit_bytes else ("total", "")
        )
        rows.append(
            f'<div class="memory"><div class="rank">rank {stage["rank"]}</div>'
            f'<svg role="img" aria-label="memory of rank {stage["rank"]}">{"".join(boxes)}</svg>'
            f'<div class="{look}">{bytes_text(total)}, {_percent(total / limit_bytes)}{over}</div></div>'
        )
    legend = _legend((colour, name) for part, (name, colour) in _MEMORY_PARTS.items() if part in seen)
    lines = "\n".join(rows)
    limit = f"The dashed line is what {report['device']['name']} has: {bytes_text(limit_bytes)}."
    return f"<h2>Memory</h2>\n<p>{escape(limit)}</p>\n{legend}\n{lines}"


def _timeline(report: Mapping[str, Any]) -> str:
    """Return the actions of a step, a row a rank, as wide as most numbers need and no narrower than a page."""
    spans = [[(Action.parse(span["action"]), span["start_s"], span["end_s"]) for span in row] for row in _rows(report)]
    if not any(spans):
        return ""
    step_s = max(end_s for row in spans for _, _, end_s in row) or 1.0
    widths = sorted((end_s - start_s) / step_s for row in spans for _, start_s, end_s in row)
    last = max(action.micro_batch for row in spans for action, _, _ in row)
    need = _CHARACTER_WIDTH * len(str(last)) + 4
    width = min(6000.0, max(900.0, need / max(widths[len(widths) // 4], 1e-9)))
    parts = [_ticks(step_s, width, len(spans))]
    for rank, row in enumerate(spans):
        top = rank * (_ROW + _GAP)
        stages = sorted({action.stage for action, _, _ in row})
        parts.append(
            f'<text x="0" y="{top + 17}">rank {rank}</text>'
            f'<rect class="row" x="{_MARGIN}" y="{top}" width="{width:.1f}" height="{_ROW}"/>'
        )
        for action, start_s, end_s in row:
            colour = shade(ACTION_COLOURS[action.kind], stages.index(action.stage) / max(1, len(stages) - 1))
            left, room = _MARGIN + start_s / step_s * width, (end_s - start_s) / step_s * width
            parts.append(
                f'<rect x="{left:.2f}" y="{top}" width="{max(room - 0.6, 0.2):.2f}" height="{_ROW}" fill="{colour}">'
                f"<title>{action}, {seconds_text(end_s - start_s)} from {seconds_text(start_s)}</title></rect>"
            )
            if room >= _CHARACTER_WIDTH * len(str(action.micro_batch)) + 2:
                parts.append(
                    f'<text x="{left + room / 2:.2f}" y="{top + 17}" text-anchor="middle" '
                    f'style="fill:{ink_on(colour)}">'
                    f"{action.micro_batch}</text>"
                )
    height = len(spans) * (_ROW + _GAP) + 16
    picture = (
        f'<svg class="timeline" viewBox="0 0 {_MARGIN + width + 24:.0f} {height}" style="min-width:{width:.0f}px" '
        f'role="img" aria-label="timeline of a step">{"".join(parts)}</svg>'
    )
    kinds = sorted({action.kind for row in spans for action, _, _ in row}, key="FBIW".index)
    legend = _legend((ACTION_COLOURS[kind], ACTION_NAMES[kind]) for kind in kinds)
    several = any(len({action.stage for action, _, _ in row}) > 1 for row in spans)
    notes = ["Numbers are micro-batches." + (" A rank's later stages are darker." if several else "")]
    total = report["layout"].get("num_micro_batches")
    if total and last + 1 < total:
        notes.append(f"Only the first {last + 1} of {total} micro-batches are shown.")
    return f"<h2>Timeline of a step</h2>\n<p>{' '.join(notes)}</p>\n{legend}\n{_scrolled(picture)}"


def _rows(report: Mapping[str, Any]) -> Sequence[Sequence[Mapping[str, Any]]]:
    return report.get("timeline") or []


def _ticks(step_s: float, width: float, num_ranks: int) -> str:
    """Return lines at round times, as many as their labels have room."""
    raw = step_s / (width / 110)
    power = 10.0 ** math.floor(math.log10(raw))
    interval = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= raw)
    bottom = num_ranks * (_ROW + _GAP)
    parts = []
    for index in range(int(step_s / interval * (1 + 1e-9)) + 1):
        x = _MARGIN + index * interval / step_s * width
        parts.append(
            f'<line class="tick" x1="{x:.2f}" x2="{x:.2f}" y1="0" y2="{bottom}"/>'
            f'<text x="{x:.2f}" y="{bottom + 12}" text-anchor="middle">{seconds_text(index * interval)}</text>'
        )
    return "".join(parts)


def _layouts(report: Mapping[str, Any]) -> str:
    layouts = report.get("layouts") or []
    if not layouts:
        return ""
    keys = _keys(entry["layout"] for entry in layouts)
    limit_bytes = report["device"]["memory_bytes"]
    rows, here = [], set()
    for index, entry in enumerate(layouts):
        if entry["layout"] == report["layout"]:
            here.add(index)
        rows.append(
            [
                str(index + 1),
                *(escape(_value(entry["layout"].get(key))) for key in keys),
                _shown(entry["tokens_per_s"], count_text),
                _shown(entry["step_time_s"], seconds_text),
                _shown(entry["bubble_fraction"], _percent),
                _shown(entry["memory_bytes"], lambda size: f"{bytes_text(size)}, {_percent(size / limit_bytes)}"),
            ]
        )
    heads = ["", *(_LAYOUT_KEYS.get(key, key) for key in keys), "tokens per second", "step", "bubble", "memory"]
    note = "<p>The fastest first; the one that is shown above is marked.</p>\n" if here else ""
    return f"<h2>Layouts</h2>\n{note}{_table(heads, rows, texts={'schedule', 'checkpointing'}, here=here)}"


def _rejected(report: Mapping[str, Any]) -> str:
    rejected = report.get("rejected") or []
    if not rejected:
        return ""
    rows = [[escape(_layout(entry["layout"])), escape(entry["reason"])] for entry in rejected]
    table = _table(["layout", "reason"], rows, texts={"layout", "reason"})
    opened = " open" if len(rejected) <= 20 else ""
    count = f"{len(rejected)} layout{'s' if len(rejected) > 1 else ''}, each with its reason"
    return f"<h2>Rejected layouts</h2>\n<details{opened}><summary>{count}</summary>\n{table}</details>"


def _keys(layouts: Iterable[Mapping[str, Any]]) -> list[str]:
    """Return the keys that layouts have, the known ones first."""
    found = {key: None for layout in layouts for key in layout}
    return [key for key in _LAYOUT_KEYS if key in found] + [key for key in found if key not in _LAYOUT_KEYS]


def _table(
    heads: Sequence[str], rows: Iterable[Sequence[str]], *, texts: set[str], here: set[int] | None = None
) -> str:
    """Return a table of cells that are HTML already; columns of `texts` stand left, rows of `here` are marked."""
    looks = [' class="text"' if head in texts else "" for head in heads]
    top = "".join(f'<th scope="col"{look}>{escape(head)}</th>' for head, look in zip(heads, looks, strict=True))
    lines = []
    for index, row in enumerate(rows):
        mark = ' class="here"' if index in (here or ()) else ""
        cells = "".join(f"<td{look}>{cell}</td>" for cell, look in zip(row, looks, strict=True))
        lines.append(f"<tr{mark}>{cells}</tr>")
    body = "\n".join(lines)
    return _scrolled(f"<table>\n<thead><tr>{top}</tr></thead>\n<tbody>\n{body}\n</tbody></table>")


def _scrolled(wide: str) -> str:
    """Return what may be wider than the screen in a box that scrolls, by keys as well."""
    return f'<div class="scroll" tabindex="0">{wide}</div>'


def _legend(entries: Iterable[tuple[str, str]]) -> str:
    items = "".join(
        f'<li><svg aria-hidden="true"><rect width="100%" height="100%" fill="{colour}"/></svg>{name}</li>'
        for colour, name in entries
    )
    return f'<ul class="legend">{items}</ul>'


def _layout(layout: Mapping[str, Any], limit: int | None = None) -> str:
    return ", ".join(f"{_LAYOUT_KEYS.get(key, key)} {_value(layout[key])}" for key in _keys([layout])[:limit])


def _value(value: object) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return {None: "-", True: "yes", False: "no"}[value] if value is None or isinstance(value, bool) else str(value)


def _shown(value: float | None, form: Callable[[float], str]) -> str:
    return "-" if value is None else form(value)


def _percent(share: float) -> str:
    return f"{100 * share:.3g} %"
