"""Simulator of schedules: the start and end of each action of a table, from the costs of the actions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate
from statistics import median

from pipekit.schedules.action import Action
from pipekit.schedules.dependencies import dry_run, needs
from pipekit.schedules.schedule import Schedule
from pipekit.schedules.validate import validate


@dataclass(frozen=True)
class Costs:
    """Costs of the actions of a step.

    Attributes:
        forward_s: time of each stage's forward for one micro-batch, in seconds.
        input_gradient_s: time of each stage's input gradient for one micro-batch, in seconds.
        weight_gradient_s: time of each stage's weight gradient for one micro-batch, in seconds; a whole backward takes
            the time of both gradients.
        transfer_s: seconds until an activation or a gradient reaches another rank; both ranks can compute meanwhile.
        overhead_s: seconds that a rank spends on every action in addition to its computation.
        activation_bytes: bytes that each stage holds per micro-batch from the forward to the end of the backward; 1 by
            default.
    """

    forward_s: Sequence[float]
    input_gradient_s: Sequence[float]
    weight_gradient_s: Sequence[float]
    transfer_s: float = 0.0
    overhead_s: float = 0.0
    activation_bytes: Sequence[float] | None = None

    @classmethod
    def uniform(
        cls,
        num_stages: int,
        *,
        forward_s: float = 1.0,
        input_gradient_s: float = 1.0,
        weight_gradient_s: float = 1.0,
        transfer_s: float = 0.0,
        overhead_s: float = 0.0,
    ) -> Costs:
        """Return equal costs for all stages."""
        forward, inputs, weights = ([cost] * num_stages for cost in (forward_s, input_gradient_s, weight_gradient_s))
        return cls(forward, inputs, weights, transfer_s=transfer_s, overhead_s=overhead_s)

    @property
    def num_stages(self) -> int:
        """Number of stages that the costs are for."""
        return len(self.forward_s)

    def of(self, action: Action) -> float:
        """Return the seconds that an action takes, including the overhead."""
        stage = action.stage
        seconds = {
            "F": self.forward_s[stage],
            "I": self.input_gradient_s[stage],
            "W": self.weight_gradient_s[stage],
            "B": self.input_gradient_s[stage] + self.weight_gradient_s[stage],
        }
        return seconds[action.kind] + self.overhead_s


@dataclass(frozen=True)
class Span:
    """Start and end of an action, in seconds since the step began."""

    action: Action
    start_s: float
    end_s: float


@dataclass(frozen=True)
class Timeline:
    """Timeline of a step: start and end of every action on each rank, simulated or measured.

    Attributes:
        schedule: the table of the step.
        spans: start and end of each pipeline rank's actions, in order.
        costs: costs that were simulated; None if the spans were measured.
    """

    schedule: Schedule
    spans: tuple[tuple[Span, ...], ...]
    costs: Costs | None = field(default=None, compare=False)

    @cached_property
    def step_time_s(self) -> float:
        """Seconds from the start of the step to the end of its last action."""
        return max((spans[-1].end_s for spans in self.spans if spans), default=0.0)

    @property
    def bubble_fraction(self) -> float:
        """Fraction of the step in which ranks are idle, averaged over all ranks, in [0, 1]."""
        if not self.step_time_s:
            return 0.0
        busy_s = sum(span.end_s - span.start_s for spans in self.spans for span in spans)
        return 1 - busy_s / (len(self.spans) * self.step_time_s)

    @property
    def peak_bytes(self) -> tuple[float, ...]:
        """Peak bytes of activations on each rank; without sizes, the peak number of stage activations."""
        given = self.costs.activation_bytes if self.costs else None
        sizes = [1.0] * self.schedule.num_stages if given is None else given
        changes = ([action.activation_change * sizes[action.stage] for action in row] for row in self.schedule.ranks)
        return tuple(max(accumulate(row, initial=0.0)) for row in changes)


def simulate(schedule: Schedule, costs: Costs) -> Timeline:
    """Simulate a step of a schedule: each action starts when its rank is free and its inputs have arrived.

    Raises:
        ScheduleError: if the table is not a valid schedule, or ranks wait for each other forever.

    Example:
        >>> from pipekit.schedules import plan_1f1b
        >>> timeline = simulate(plan_1f1b(num_stages=4, num_micro_batches=8), Costs.uniform(4))
        >>> timeline.step_time_s, round(timeline.bubble_fraction, 3)
        (33.0, 0.273)
    """
    order, stuck = dry_run(schedule)
    if stuck:
        validate(schedule)
    ends: dict[Action, float] = {}
    spans: list[list[Span]] = [[] for _ in schedule.ranks]
    for rank, action in order:
        start_s = spans[rank][-1].end_s if spans[rank] else 0.0
        for other in needs(action, schedule):
            crosses = schedule.placement[other.stage] != rank
            start_s = max(start_s, ends[other] + (costs.transfer_s if crosses else 0.0))
        ends[action] = start_s + costs.of(action)
        spans[rank].append(Span(action, start_s, ends[action]))
    return Timeline(schedule, tuple(map(tuple, spans)), costs)


def median_costs(timelines: Sequence[Timeline]) -> Costs:
    """Median costs of measured actions, by kind and stage, and of transfers and overheads.

    A transfer lasts from the end of an action to the start of the action that waited for its result. An overhead is the
    time between two consecutive actions of a rank if the second did not wait for anything. If a stage ran only whole
    backwards, the weight gradient counts as half of each.

    Example:
        >>> from pipekit.schedules import plan_1f1b
        >>> costs = Costs([1, 2], [1, 2], [1, 2], transfer_s=0.25)
        >>> median_costs([simulate(plan_1f1b(num_stages=2, num_micro_batches=4), costs)]) == costs
        True
    """
    times: dict[tuple[int, str], list[float]] = {}
    transfers: list[float] = []
    gaps: list[float] = []
    for timeline in timelines:
        placement = timeline.schedule.placement
        spans = {span.action: span for row in timeline.spans for span in row}
        for rank, row in enumerate(timeline.spans):
            free_s = 0.0
            for span in row:
                action = span.action
                times.setdefault((action.stage, action.kind), []).append(span.end_s - span.start_s)
                remote = (other for other in needs(action, timeline.schedule) if placement[other.stage] != rank)
                sent_s = max((spans[other].end_s for other in remote), default=0.0)
                if sent_s > free_s:
                    transfers.append(max(0.0, span.start_s - sent_s))
                elif span is not row[0]:
                    gaps.append(max(0.0, span.start_s - free_s))
                free_s = span.end_s
    medians = {key: median(values) for key, values in times.items()}
    stages = sorted({stage for stage, _ in medians})
    halves = {stage: medians.get((stage, "B"), 0.0) / 2 for stage in stages}
    return Costs(
        [medians[stage, "F"] for stage in stages],
        [medians.get((stage, "I"), halves[stage]) for stage in stages],
        [medians.get((stage, "W"), halves[stage]) for stage in stages],
        transfer_s=median(transfers) if transfers else 0.0,
        overhead_s=median(gaps) if gaps else 0.0,
    )
