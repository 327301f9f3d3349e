"""Pictures of a step: the measured timeline beside the simulated one, as text, as a picture and as JSON."""

from __future__ import annotations

import json
from pathlib import Path

from pipekit.schedules import Timeline
from pipekit.schedules.draw import draw_picture, draw_text


def save_timelines(measured: Timeline, simulated: Timeline, path: Path) -> None:
    """Write `path` with the endings `.txt`, `.svg` and `.json`: a measured step under the simulated one.

    Without matplotlib there is no picture.
    """
    both = {"simulated": simulated, "measured": measured}
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "\n\n".join(f"{name}\n{draw_text(timeline)}" for name, timeline in both.items())
    path.with_suffix(".txt").write_text(text + "\n", encoding="utf-8")
    record = {
        name: {
            "step_time_s": timeline.step_time_s,
            "bubble_fraction": timeline.bubble_fraction,
            "ranks": [[[str(span.action), span.start_s, span.end_s] for span in spans] for spans in timeline.spans],
        }
        for name, timeline in both.items()
    }
    path.with_suffix(".json").write_text(json.dumps(record) + "\n", encoding="utf-8")
    draw_picture(path.with_suffix(".svg"), both)
