"""Timelines of all ranks as one Chrome trace, which Perfetto opens: what was measured over what was planned."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pipekit.step_profile.spans import RankSteps, StepSpan

MEASURED, PLANNED = 0, 1
"""Lanes of a rank: the `tid` of their events."""


def chrome_trace(
    ranks: Sequence[RankSteps],
    planned: Mapping[int, Sequence[StepSpan]],
    memory: Mapping[int, Sequence[tuple[float, int]]] | None = None,
) -> dict[str, Any]:
    """Chrome trace of ranks: a process for each, with a lane of measured spans, and one of planned ones.

    Args:
        ranks: on a common clock.
        planned: spans of each rank's plan, on the same clock.
        memory: seconds of the same clock and bytes, by rank.

    Source: "Trace Event Format", https://docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU.

    Example:
        >>> rank = RankSteps(0, 0, 0, 0, [[StepSpan("forward", "run 0F0", 2.0, 2.5)]])
        >>> print(chrome_trace([rank], {})["traceEvents"][-1])
        {'name': 'run 0F0', 'cat': 'forward', 'ph': 'X', 'pid': 0, 'tid': 0, 'ts': 0.0, 'dur': 500000.0}
    """
    zero_s = min(spans[0].start_s for rank in ranks for spans in rank.steps)
    events: list[dict[str, Any]] = []
    for rank in ranks:
        name = f"rank {rank.rank} (pipe {rank.pipe}, data {rank.data}, tensor {rank.tensor})"
        events += [
            {"name": "process_name", "ph": "M", "pid": rank.rank, "args": {"name": name}},
            {"name": "process_sort_index", "ph": "M", "pid": rank.rank, "args": {"sort_index": rank.rank}},
        ]
        lanes = {MEASURED: [span for spans in rank.steps for span in spans], PLANNED: planned.get(rank.rank, ())}
        for lane, spans in lanes.items():
            if spans:
                what = "planned" if lane == PLANNED else "measured"
                events.append({"name": "thread_name", "ph": "M", "pid": rank.rank, "tid": lane, "args": {"name": what}})
                events += _events_of(spans, rank.rank, lane, zero_s)
        for at_s, num_bytes in (memory or {}).get(rank.rank, ()):
            values = {"GB": round(num_bytes / 1e9, 6)}
            events.append({"name": "memory", "ph": "C", "pid": rank.rank, "ts": _us(at_s - zero_s), "args": values})
    return {"traceEvents": events, "displayTimeUnit": "ms"}


def _events_of(spans: Sequence[StepSpan], rank: int, lane: int, zero_s: float) -> Iterator[dict[str, Any]]:
    for span in spans:
        start, end = _us(span.start_s - zero_s), _us(span.end_s - zero_s)
        yield {
            "name": span.operation or span.kind,
            "cat": span.kind,
            "ph": "X",
            "pid": rank,
            "tid": lane,
            "ts": start,
            "dur": round(end - start, 3),
        }


def _us(seconds: float) -> float:
    return round(seconds * 1e6, 3)
