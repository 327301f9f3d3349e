"""Charts as plain data, which the pages' script draws: lines over steps, and timelines of ranks."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

from pipekit.plan.train_result import Series
from pipekit.schedules.action import ACTION_NAMES, Action
from pipekit.schedules.draw import ACTION_COLOURS, ink_on, shade

ROW_HEIGHT = 26
"""Height of a row of bars, in pixels."""

_AXIS_HEIGHT = 70  # of the axis and the legend
_LEFT = 60  # width of the names of the rows
_CHARACTER_WIDTH = 6.6  # of a micro-batch's number

TimedAction = tuple[str, float, float]
"""Action as the pipeline's table writes it, such as `0F3`, with its start and its end in seconds."""


def points(series: Series) -> list[list[float | None]]:
    """Pairs of step and value with six digits, as JSON holds them: null in place of what is not finite."""
    pairs = zip(series.steps.tolist(), series.values.tolist(), strict=True)
    return [[step, float(f"{value:.6g}") if math.isfinite(value) else None] for step, value in pairs]


def line(
    label: str, series: Series, *, colour: int | None, style: str = "line", in_legend: bool = True
) -> dict[str, Any]:
    """Curve of a chart of lines.

    Args:
        label: its name.
        series: its steps and values.
        colour: index of its colour; None for that of warnings.
        style: `line`, `dashed`, `faint`, `dots`, or `trend`, which has no tooltip.
        in_legend: whether the legend names it.
    """
    return {"label": label, "points": points(series), "colour": colour, "style": style, "in_legend": in_legend}


def timeline_chart(rows: Sequence[Sequence[TimedAction]], *, title: str, end_s: float | None = None) -> dict[str, Any]:
    """Chart of what each rank of a pipeline does when; later stages of a rank are darker.

    It is as wide as most numbers of micro-batches need, in pixels (`width`), and as high as its rows (`height`).

    Args:
        rows: the actions of each rank.
        title: its name, for those who cannot see it.
        end_s: end of the axis; that of the last action if left out.
    """
    parsed = [[(Action.parse(action), start_s, end_s) for action, start_s, end_s in row] for row in rows]
    every = [timed for row in parsed for timed in row]
    step_s = end_s or max((end for _, _, end in every), default=0.0) or 1.0
    series: dict[tuple[int, int], dict[str, Any]] = {}
    for rank, row in enumerate(parsed):
        stages = sorted({action.stage for action, _, _ in row})
        for action, start_s, stop_s in row:
            place = stages.index(action.stage)
            colour = shade(ACTION_COLOURS[action.kind], place / max(1, len(stages) - 1))
            entry = series.setdefault(
                ("FBIW".index(action.kind), place),
                {
                    "label": ACTION_NAMES[action.kind],
                    "colour": colour,
                    "ink": ink_on(colour),
                    "in_legend": place == 0,
                    "spans": [],
                },
            )
            times = [float(f"{time_s:.6g}") for time_s in (start_s, stop_s)]
            entry["spans"].append([rank, *times, str(action.micro_batch), str(action)])
    last = max((action.micro_batch for action, _, _ in every), default=0)
    widths = sorted((stop_s - start_s) / step_s for _, start_s, stop_s in every) or [1.0]
    need = _CHARACTER_WIDTH * len(str(last)) + 4
    return {
        "kind": "timeline",
        "title": title,
        "rows": rank_names(range(len(rows))),
        "end_s": step_s,
        "series": [series[key] for key in sorted(series)],
        "width": round(min(6000.0, max(260.0, need / max(widths[len(widths) // 2], 1e-9)))) + _LEFT,
        "height": bars_height(len(rows)),
        "num_micro_batches": last + 1,
        "has_later_stages": any(len({action.stage for action, _, _ in row}) > 1 for row in parsed),
    }


def rank_names(ranks: Iterable[int]) -> list[str]:
    """Names of the rows of ranks."""
    return [f"rank {rank}" for rank in ranks]


def bars_height(rows: int) -> int:
    """Height of a chart with so many rows of bars, in pixels."""
    return ROW_HEIGHT * rows + _AXIS_HEIGHT
