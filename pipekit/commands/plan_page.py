"""A predicted run as one page of HTML that opens anywhere: styles and pictures inside, nothing loaded, no scripts."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from jinja2 import Environment, PackageLoader

from pipekit.commands.number_text import bytes_text, count_text, seconds_text
from pipekit.commands.plan_tables import checkpointing_text
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
}
"""The parts of a rank's memory in the order of their bars, each with its name and colour (Okabe and Ito 2008)."""

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
"""The keys of a layout, with the heads of their columns."""

_LEFT = 56  # room for the name of a rank, in the units of the timeline's picture
_ROW_HEIGHT = 30  # of which the template fills 26
_CHARACTER_WIDTH = 6.4  # of a number of 11 units height


def render_html(report: Mapping[str, Any]) -> str:
    """Page of HTML that shows a predicted run.

    Args:
        report: the report of `--json`: `parameters`, `layout`, `device`, `step_time_s`, `tokens_per_s`,
            `tflops_per_device`, `bubble_fraction` and `stages`; `timeline`, `layouts` and `rejected` where they are
            there. None is shown as a dash.

    Example:
        >>> device = {"name": "h100", "memory_bytes": 80e9, "usable_bytes": 74.5e9}
        >>> page = render_html({"parameters": 124e6, "layout": {"pp": 1}, "device": device, "step_time_s": 0.5,
        ...     "tokens_per_s": 1e5, "tflops_per_device": 300.0, "bubble_fraction": 0.0, "stages": []})
        >>> "<dd>124.0 M</dd>" in page, "<script" in page
        (True, False)
    """
    environment = Environment(
        loader=PackageLoader("pipekit.commands"), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    forms = {"count": count_text, "bytes": bytes_text, "seconds": seconds_text}
    forms |= {"figure": "{:.4g}".format, "percent": lambda share: f"{100 * share:.3g} %"}
    for name, form in forms.items():
        environment.filters[name] = lambda number, form=form: "-" if number is None else form(number)
    environment.filters |= {"layout": _layout, "value": _value, "keys": _keys}
    environment.filters["key"] = lambda key: _LAYOUT_KEYS.get(key, key)
    return environment.get_template("plan.html").render(
        report=report, limit=report["device"]["usable_bytes"], memory=_memory(report), timeline=_timeline(report)
    )


def _memory(report: Mapping[str, Any]) -> dict[str, Any]:
    """Bars of the ranks' memory at its peak; positions in per cent, so that bars fit any screen."""
    limit_bytes = report["device"]["usable_bytes"]
    scale = 98 / max(limit_bytes, *(stage["memory_bytes"]["total"] for stage in report["stages"]), 0)
    ranks, seen = [], set()
    for stage in report["stages"]:
        boxes, start = [], 0.0
        for part, (name, colour) in _MEMORY_PARTS.items():
            size = stage["memory_bytes"].get(part, 0)
            if not size:
                continue
            seen.add(part)
            x, width = f"{start * scale:.3f}", f"{size * scale:.3f}"
            boxes.append({"x": x, "width": width, "colour": colour, "name": name, "size": size})
            start += size
        ranks.append({"number": stage["rank"], "boxes": boxes, "total": stage["memory_bytes"]["total"]})
    legend = [{"name": name, "colour": colour} for part, (name, colour) in _MEMORY_PARTS.items() if part in seen]
    return {"ranks": ranks, "legend": legend, "limit_x": f"{limit_bytes * scale:.3f}"}


def _timeline(report: Mapping[str, Any]) -> dict[str, Any] | None:
    """Actions of a step, a row a rank, as wide as most numbers need and no narrower than a page."""
    spans = [
        [(Action.parse(span["action"]), span["start_s"], span["end_s"]) for span in row]
        for row in report.get("timeline") or []
    ]
    if not any(spans):
        return None
    step_s = max(end_s for row in spans for _, _, end_s in row) or 1.0
    widths = sorted((end_s - start_s) / step_s for row in spans for _, start_s, end_s in row)
    last = max(action.micro_batch for row in spans for action, _, _ in row)
    need = _CHARACTER_WIDTH * len(str(last)) + 4
    width = round(min(6000.0, max(900.0, need / max(widths[len(widths) // 4], 1e-9))))
    rows = []
    for rank, row in enumerate(spans):
        stages = sorted({action.stage for action, _, _ in row})
        boxes = []
        for action, start_s, end_s in row:
            colour = shade(ACTION_COLOURS[action.kind], stages.index(action.stage) / max(1, len(stages) - 1))
            left, room = _LEFT + start_s / step_s * width, (end_s - start_s) / step_s * width
            boxes.append(
                {
                    "action": str(action),
                    "micro_batch": action.micro_batch,
                    "start_s": start_s,
                    "duration_s": end_s - start_s,
                    "x": f"{left:.2f}",
                    "width": f"{max(room - 0.6, 0.2):.2f}",
                    "centre": f"{left + room / 2:.2f}",
                    "colour": colour,
                    "ink": ink_on(colour),
                    "has_label": room >= _CHARACTER_WIDTH * len(str(action.micro_batch)) + 2,
                }
            )
        rows.append({"y": rank * _ROW_HEIGHT, "boxes": boxes})
    kinds = sorted({action.kind for row in spans for action, _, _ in row}, key="FBIW".index)
    return {
        "rows": rows,
        "left": _LEFT,
        "width": width,
        "height": len(spans) * _ROW_HEIGHT,
        "ticks": _ticks(step_s, width),
        "legend": [{"name": ACTION_NAMES[kind], "colour": ACTION_COLOURS[kind]} for kind in kinds],
        "has_later_stages": any(len({action.stage for action, _, _ in row}) > 1 for row in spans),
        "num_shown": last + 1,
    }


def _ticks(step_s: float, width: float) -> list[dict[str, Any]]:
    """Round times, as many as their labels have room."""
    raw = step_s / (width / 110)
    power = 10.0 ** math.floor(math.log10(raw))
    interval = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= raw)
    times_s = [index * interval for index in range(int(step_s / interval * (1 + 1e-9)) + 1)]
    return [{"x": f"{_LEFT + time_s / step_s * width:.2f}", "time_s": time_s} for time_s in times_s]


def _keys(layouts: Iterable[Mapping[str, Any]]) -> list[str]:
    """Keys that layouts have, the known ones first."""
    found = {key: None for layout in layouts for key in layout}
    return [key for key in _LAYOUT_KEYS if key in found] + [key for key in found if key not in _LAYOUT_KEYS]


def _layout(layout: Mapping[str, Any], limit: int | None = None) -> str:
    return ", ".join(f"{_LAYOUT_KEYS.get(key, key)} {_value(layout[key])}" for key in _keys([layout])[:limit])


def _value(value: object) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value))
    if isinstance(value, dict):
        return checkpointing_text(value)
    return {None: "-", True: "yes", False: "no"}[value] if value is None or isinstance(value, bool) else str(value)
