"""Page of a predicted run: figures, stages, memory of ranks, a step's timeline, and the layouts that were compared."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from pipekit.pages.charts import TimedAction, bars_height, rank_names, timeline_chart
from pipekit.pages.render import render
from pipekit.settings.activations import read_setting

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


def render_html(report: Mapping[str, Any]) -> str:
    """Page of HTML that shows a predicted run.

    Args:
        report: the report of `--json`: `parameters`, `layout`, `device`, `step_time_s`, `tokens_per_s`,
            `tflops_per_device`, `bubble_fraction` and `stages`; `run`, `timeline`, `layouts` and `rejected` where they
            are there. None is shown as a dash.

    Example:
        >>> device = {"name": "h100", "memory_bytes": 80e9, "usable_bytes": 74.5e9}
        >>> page = render_html({"parameters": 124e6, "layout": {"pp": 1}, "device": device, "step_time_s": 0.5,
        ...     "tokens_per_s": 1e5, "tflops_per_device": 300.0, "bubble_fraction": 0.0, "stages": []})
        >>> "<dd>124.0 M</dd>" in page
        True
    """
    timeline = timeline_chart(_rows(report), title="timeline of a step") if any(_rows(report)) else None
    memory = _memory(report) if report["stages"] else None
    return render(
        "plan.html",
        report=report,
        limit=report["device"]["usable_bytes"],
        layout_text=layout_text,
        value_text=_value,
        layout_keys=_keys([entry["layout"] for entry in report.get("layouts") or []]),
        heads_of=_LAYOUT_KEYS,
        memory=memory,
        timeline=timeline,
        charts=[chart for chart in (memory, timeline) if chart is not None],
    )


def _rows(report: Mapping[str, Any]) -> list[list[TimedAction]]:
    return [[(span["action"], span["start_s"], span["end_s"]) for span in row] for row in report.get("timeline") or []]


def _memory(report: Mapping[str, Any]) -> dict[str, Any]:
    """Bars of the ranks' memory at its peak, by its parts, beside the limit."""
    stages = report["stages"]
    sizes = {part: [stage["memory_bytes"].get(part, 0) for stage in stages] for part in _MEMORY_PARTS}
    return {
        "kind": "bars",
        "title": "memory of each rank at its peak",
        "unit": "bytes",
        "rows": rank_names(stage["rank"] for stage in stages),
        "height": bars_height(len(stages)),
        "limit": report["device"]["usable_bytes"],
        "series": [
            {"label": name, "colour": colour, "values": sizes[part]}
            for part, (name, colour) in _MEMORY_PARTS.items()
            if any(sizes[part])
        ],
    }


def _keys(layouts: Iterable[Mapping[str, Any]]) -> list[str]:
    """Keys that layouts have, the known ones first."""
    found = {key: None for layout in layouts for key in layout}
    return [key for key in _LAYOUT_KEYS if key in found] + [key for key in found if key not in _LAYOUT_KEYS]


def layout_text(layout: Mapping[str, Any], limit: int | None = None) -> str:
    """Layout and its options in one line, at most `limit` of them."""
    return ", ".join(f"{_LAYOUT_KEYS.get(key, key)} {_value(layout[key])}" for key in _keys([layout])[:limit])


def checkpointing_text(setting: bool | Mapping[str, Any]) -> str:
    """Setting of activation checkpointing in a cell: yes, no, or its keys.

    Example:
        >>> checkpointing_text(False), checkpointing_text({"every": 2, "offload": True})
        ('no', 'every=2 offload')
    """
    if isinstance(setting, bool):
        return "yes" if setting else "no"
    return str(read_setting(setting)).partition(" ")[2]


def _value(value: object) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value))
    if isinstance(value, dict):
        return checkpointing_text(value)
    return {None: "-", True: "yes", False: "no"}[value] if value is None or isinstance(value, bool) else str(value)
