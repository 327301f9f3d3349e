"""Spans of a step: every moment of a rank's step belongs to one kind of action."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from pipekit.schedules import Action, Timeline
from pipekit.schedules import Span as ActionSpan
from pipekit.schedules.action import ACTION_NAMES
from pipekit.schedules.operations import Operation
from pipekit.schedules.schedule import Schedule

_KINDS_OF_WORDS = {
    "beginning the step": "begin",
    "reading the batches of the step": "data",
    "ending the step": "end",
    "reducing the gradients": "reduce",
    "updating the weights": "update",
}

KINDS = ("begin", "data", "receive", *ACTION_NAMES.values(), "send", "reduce", "update", "end", "other")
"""Kinds of actions in the order of a table. `receive` includes waiting for the message, which is the bubble."""


@dataclass(frozen=True)
class StepSpan:
    """Time of one operation of a rank.

    Attributes:
        kind: one of `KINDS`.
        operation: as the pipeline's table writes it, such as `receive 0F1`; empty for what is not in the table.
        start_s, end_s: seconds of the rank's clock, or of the common one.
    """

    kind: str
    operation: str
    start_s: float
    end_s: float

    @property
    def action(self) -> Action | None:
        """The action of the table that it belongs to."""
        return Action.parse(self.operation.split()[1]) if self.operation else None


@dataclass(frozen=True)
class RankSteps:
    """Timed steps of one rank.

    Attributes:
        rank: the global rank.
        pipe, data, tensor: its coordinate.
        steps: the spans of each step, without a gap.
    """

    rank: int
    pipe: int
    data: int
    tensor: int
    steps: Sequence[Sequence[StepSpan]]

    @property
    def step_s(self) -> float:
        """Mean wall clock of a step."""
        return sum(spans[-1].end_s - spans[0].start_s for spans in self.steps) / len(self.steps)

    def seconds_by_kind(self) -> dict[str, float]:
        """Mean seconds of a step by kind of action, of those that occur; they add up to `step_s`."""
        sums = sum_by_kind(span for spans in self.steps for span in spans)
        return {kind: seconds / len(self.steps) for kind, seconds in sums.items()}


def kind_of(doing: Operation | str) -> str:
    """Kind of action of what a rank notes that it does.

    Example:
        >>> from pipekit.schedules import Action
        >>> kind_of(Operation("run", Action(0, "B", 3))), kind_of(Operation("receive", Action(0, "F", 3), 0))
        ('backward', 'receive')
        >>> kind_of("updating the weights"), kind_of("anything else")
        ('update', 'other')
    """
    if isinstance(doing, str):
        return _KINDS_OF_WORDS.get(doing, "other")
    if doing.kind == "run":
        return ACTION_NAMES[doing.action.kind]
    return "send" if doing.kind == "send" else "receive"


def sum_by_kind(spans: Iterable[StepSpan]) -> dict[str, float]:
    """Seconds by kind of action, in the order of `KINDS`.

    Example:
        >>> spans = [("update", 2.0, 3.0), ("data", 0.0, 0.5), ("data", 1.0, 2.0)]
        >>> sum_by_kind(StepSpan(kind, "", start_s, end_s) for kind, start_s, end_s in spans)
        {'data': 1.5, 'update': 1.0}
    """
    sums = dict.fromkeys(KINDS, 0.0)
    seen = set()
    for span in spans:
        sums[span.kind] += span.end_s - span.start_s
        seen.add(span.kind)
    return {kind: seconds for kind, seconds in sums.items() if kind in seen}


def pipeline_timeline(ranks: Sequence[RankSteps], schedule: Schedule, step: int) -> tuple[Timeline, float]:
    """Measured timeline of a step on one pipeline, and the second of the clock that is its zero.

    Args:
        ranks: of one pipeline, by pipe rank, on a common clock.
        schedule: the table that they ran.
        step: index of the step among those that were timed.
    """
    zero_s = min(rank.steps[step][0].start_s for rank in ranks)
    spans = tuple(
        tuple(
            ActionSpan(span.action, span.start_s - zero_s, span.end_s - zero_s)
            for span in rank.steps[step]
            if span.action is not None and span.operation.startswith("run ")
        )
        for rank in ranks
    )
    return Timeline(schedule, spans), zero_s


def table_of(ranks: Sequence[RankSteps], *, speeds: Mapping[int, str] | None = None, most_ranks: int = 16) -> str:
    """Table of the mean milliseconds of a step by rank and kind of action.

    Args:
        ranks: all of them, in order.
        speeds: floating-point operations per second of each rank, in words.
        most_ranks: further ranks are left out.
    """
    sums = [rank.seconds_by_kind() for rank in ranks]
    kinds = [kind for kind in KINDS if any(kind in each for each in sums)]
    rows = [["rank", *kinds, "step", *([] if speeds is None else ["speed"])]]
    for rank, each in list(zip(ranks, sums, strict=True))[:most_ranks]:
        seconds = [*(each.get(kind, 0.0) for kind in kinds), rank.step_s]
        rows.append([str(rank.rank), *(f"{1000 * value:.2f}" for value in seconds)])
        rows[-1] += [] if speeds is None else [speeds[rank.rank]]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    left_out = len(ranks) - most_ranks
    return "\n".join([*lines, *([f"and {left_out} more ranks in actions.json"] if left_out > 0 else [])])
