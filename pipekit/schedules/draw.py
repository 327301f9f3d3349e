"""Drawings of timelines, as text and as pictures."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

from pipekit.errors import PipekitError
from pipekit.schedules.action import ACTION_NAMES, ActionKind
from pipekit.schedules.simulate import Span, Timeline

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# The colour-blind can tell them apart, too; Okabe and Ito 2008.
ACTION_COLOURS: dict[ActionKind, str] = {"F": "#56B4E9", "B": "#E8743B", "I": "#F0B429", "W": "#009E73"}
_CHARACTER_WIDTH = 0.62  # of its height


def draw_text(timeline: Timeline, *, width: int = 120) -> str:
    """Draw a timeline as text: a row for each rank, with actions as wide as they are long, and dots for idle time.

    An action is shown by its kind, in lower case on the later stages of a rank, and by its micro-batch if that fits.

    Example:
        >>> from pipekit.schedules import Costs, plan_1f1b, simulate
        >>> print(draw_text(simulate(plan_1f1b(num_stages=2, num_micro_batches=2), Costs.uniform(2)), width=27))
        rank 0 F0-F1-......B0----...B1----
        rank 1 ...F0-B0----F1-B1----......
        F forward, B backward; step 9 s, bubble 33.3 %
    """
    step_s = timeline.step_time_s or 1.0
    digits = len(str(len(timeline.spans) - 1))
    first_stages = [min((span.action.stage for span in spans), default=0) for spans in timeline.spans]
    rows = []
    for rank, spans in enumerate(timeline.spans):
        columns = ["."] * width
        for span in spans:
            first = round(span.start_s / step_s * width)
            room = max(1, round(span.end_s / step_s * width) - first)
            kind = span.action.kind.lower() if span.action.stage > first_stages[rank] else span.action.kind
            label = f"{kind}{span.action.micro_batch}"
            label = label if len(label) <= room else kind
            for column, character in zip(range(first, width), label.ljust(room, "-"), strict=False):
                columns[column] = character
        rows.append(f"rank {rank:{digits}} {''.join(columns)}")
    kinds = _kinds([timeline])
    legend = ", ".join(f"{kind} {ACTION_NAMES[kind]}" for kind in kinds)
    if timeline.schedule.num_stages > len(timeline.spans):
        legend += ", small on a rank's later stages"
    rows.append(f"{legend}; {_summary(timeline)}")
    return "\n".join(rows)


def _kinds(timelines: Iterable[Timeline]) -> list[ActionKind]:
    kinds = {span.action.kind for timeline in timelines for spans in timeline.spans for span in spans}
    return sorted(kinds, key="FBIW".index)


def _summary(timeline: Timeline) -> str:
    step_s = timeline.step_time_s
    time = f"{step_s:.4g} s" if step_s >= 1 else f"{1000 * step_s:.4g} ms"
    return f"step {time}, bubble {100 * timeline.bubble_fraction:.3g} %"


def draw_picture(path: str | Path, timelines: Mapping[str, Timeline]) -> None:
    """Draw timelines as a picture, one above the other on one time axis; SVG or PNG, by the suffix of `path`.

    It has a row for each rank and a colour for each kind of action, darker for the later stages of a rank, with the
    numbers of micro-batches inside. The keys of `timelines` are their titles.

    Raises:
        PipekitError: if matplotlib is not installed, or the suffix is neither `.svg` nor `.png`.
    """
    path = Path(path)
    if path.suffix not in (".svg", ".png"):
        raise PipekitError(f"{path}: a picture ends in .svg or .png")
    try:
        from matplotlib import rc_context
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.patches import Patch
    except ImportError:
        raise PipekitError('drawing a schedule needs matplotlib; type pip install "pipekit[plot]"') from None

    longest_s = max(timeline.step_time_s for timeline in timelines.values()) or 1.0
    num_actions = max(len(spans) for timeline in timelines.values() for spans in timeline.spans)
    num_rows = [len(timeline.spans) for timeline in timelines.values()]
    width_in = min(40.0, max(10.0, 0.32 * num_actions))
    figure = Figure(figsize=(width_in, sum(0.42 * rows + 0.75 for rows in num_rows) + 0.6), layout="constrained")
    FigureCanvasAgg(figure)
    every_axes = figure.subplots(len(timelines), 1, squeeze=False, height_ratios=num_rows, sharex=True)[:, 0]
    unit, scale = ("s", 1.0) if longest_s >= 1 else ("ms", 1000.0)
    for axes, (title, timeline) in zip(every_axes, timelines.items(), strict=True):
        axes.set_title(f"{title}: {_summary(timeline)}", loc="left", fontsize=11)
        axes.set_xlim(0, longest_s * scale)
        # Inches of one second, to see which numbers fit.
        _draw_rows(axes, timeline, scale, inches_per_s=0.9 * width_in / longest_s)
    every_axes[-1].set_xlabel(f"time in {unit}")
    kinds = _kinds(timelines.values())
    handles = [Patch(facecolor=ACTION_COLOURS[kind], label=ACTION_NAMES[kind]) for kind in kinds]
    figure.legend(handles=handles, loc="outside lower right", ncols=len(handles), frameon=False, fontsize=9)
    # A fixed date and fixed names: the same timelines give the same file.
    metadata = {"Date": None} if path.suffix == ".svg" else None
    with rc_context({"svg.hashsalt": "pipekit"}):
        figure.savefig(path, dpi=110, metadata=metadata)


def _draw_rows(axes: Axes, timeline: Timeline, scale: float, *, inches_per_s: float) -> None:
    for rank, spans in enumerate(timeline.spans):
        stages = sorted({span.action.stage for span in spans})
        by_look = sorted(spans, key=lambda span: (span.action.kind, span.action.stage))
        for (kind, stage), alike in groupby(by_look, key=lambda span: (span.action.kind, span.action.stage)):
            colour = shade(ACTION_COLOURS[kind], stages.index(stage) / max(1, len(stages) - 1))
            boxed = list(alike)
            boxes = [(span.start_s * scale, (span.end_s - span.start_s) * scale) for span in boxed]
            axes.broken_barh(boxes, (rank - 0.42, 0.84), facecolors=colour, edgecolors="white", linewidth=0.6)
            for span in boxed:
                _label(axes, span, rank, scale, inches_per_s, ink=ink_on(colour))
    axes.set_ylim(len(timeline.spans) - 0.45, -0.55)
    axes.set_yticks(range(len(timeline.spans)), [f"rank {rank}" for rank in range(len(timeline.spans))])
    axes.tick_params(length=0)
    axes.set_facecolor("#F2F2F2")
    for side in axes.spines.values():
        side.set_visible(False)


def _label(axes: Axes, span: Span, rank: int, scale: float, inches_per_s: float, *, ink: str) -> None:
    text = str(span.action.micro_batch)
    room_in = (span.end_s - span.start_s) * inches_per_s
    size_pt = min(9.0, 72 * room_in / (_CHARACTER_WIDTH * len(text) + 0.4))
    if size_pt >= 4.5:
        centre = (span.start_s + span.end_s) / 2 * scale
        axes.text(centre, rank, text, ha="center", va="center", fontsize=size_pt, color=ink, clip_on=True)


def shade(colour: str, depth: float) -> str:
    """Return a colour, darker the nearer `depth` is to 1."""
    channels = (int(colour[start : start + 2], 16) for start in (1, 3, 5))
    return "#" + "".join(f"{round(channel * (1 - 0.3 * depth)):02X}" for channel in channels)


def ink_on(colour: str) -> str:
    """Contrasting text colour on a background: near-black or white, by the relative luminance that WCAG defines."""
    channels = (int(colour[start : start + 2], 16) / 255 for start in (1, 3, 5))
    luminance = sum(weight * channel**2.2 for weight, channel in zip((0.2126, 0.7152, 0.0722), channels, strict=True))
    return "#1A1A1A" if luminance > 0.2 else "white"
