"""Contenders take turns: each does one step a round, so that noise on the machine hits all alike."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from threading import Barrier
from typing import Literal

from pipekit.schedules import Schedule
from pipelines.ranks import WAITING, Say

System = Literal["DeepSpeed", "torch", "pipekit", "limit"]

Step = Callable[[], float | None]
"""Trains on one global batch, and returns the loss on the ranks that know it."""


@dataclass(frozen=True)
class Contender:
    """One way to train the model.

    Attributes:
        system: whose pipeline.
        schedule: the name of its schedule.
        partition: how the layers are cut: DeepSpeed's name of it, or the first layer of each stage but the first.
        boundaries: stage `s` holds layers `boundaries[s]` to `boundaries[s + 1] - 1`; empty for DeepSpeed, which has
            partitions of its own.
        table: of our schedule.
        measures_costs: whether our table is planned anew for what the layers cost in the first steps.
    """

    system: System
    schedule: str = ""
    partition: str = ""
    boundaries: tuple[int, ...] = ()
    table: Schedule | None = field(default=None, compare=False, repr=False)
    measures_costs: bool = False

    def __str__(self) -> str:
        return " ".join(
            part for part in (self.system, self.schedule, self.partition and f"cut {self.partition}") if part
        )


@dataclass
class Turns:
    """Times of a contender on one rank.

    Attributes:
        spans_s: begin and end of each step, by a clock that all processes of a machine share.
        loss: of the last step, on the ranks that know it.
    """

    spans_s: list[tuple[float, float]] = field(default_factory=list)
    loss: float | None = None


def take_turns(
    order: Sequence[Contender], build: Callable[[Contender], Step | None], rounds: int, turn: Barrier, say: Say
) -> dict[Contender, Turns]:
    """Build each contender and run it once to warm up, then once in each round, beginning each with the next of them.

    Args:
        order: all contenders; the same on every rank of every team.
        build: returns the step of a contender; None where it lives in another team's processes, which have the machine
            for themselves meanwhile.
        rounds: how often each is timed.
        turn: a barrier for the ranks of all teams.
        say: called with what this rank does next.
    """
    import torch.distributed as dist

    def begin(what: str, contender: Contender) -> None:
        say(f"{WAITING} {what} {contender}")
        turn.wait()

    steps: dict[Contender, Step] = {}
    for contender in order:
        begin("the build of", contender)
        say(f"build and warm-up of {contender}")
        step = build(contender)
        if step is not None:
            steps[contender] = step
            dist.barrier()
            step()
    turns = {contender: Turns() for contender in steps}
    for index in range(rounds):
        first = index % len(order)
        for contender in [*order[first:], *order[:first]]:
            begin("the turn of", contender)
            if contender not in steps:
                continue
            say(f"round {index + 1} of {rounds}, {contender}")
            gc.collect()
            dist.barrier()
            begin_s = time.monotonic()
            turns[contender].loss = steps[contender]()
            turns[contender].spans_s.append((begin_s, time.monotonic()))
    begin("the end of", order[-1])
    return turns


@dataclass(frozen=True)
class Result:
    """Measurement of a contender.

    Attributes:
        steps_s: how long the step of each round took: from the first rank's begin to the last rank's end.
        ranks_s: each rank's own time, the median over the rounds.
        loss: of the last step; None where no rank knows it.
    """

    steps_s: list[float]
    ranks_s: list[float]
    loss: float | None

    @property
    def step_s(self) -> float:
        """The median over the rounds."""
        return median(self.steps_s)


Results = dict[Contender, Result]


def combine(order: Sequence[Contender], ranks: Sequence[Mapping[Contender, Turns]]) -> Results:
    """Return each contender's result from what each rank of its team saw, in the order given."""
    results: Results = {}
    for contender in order:
        seen = [rank[contender] for rank in ranks if contender in rank]
        rounds = list(zip(*(turns.spans_s for turns in seen), strict=True))
        results[contender] = Result(
            steps_s=[max(end for _, end in spans) - min(begin for begin, _ in spans) for spans in rounds],
            ranks_s=[median(end - begin for begin, end in turns.spans_s) for turns in seen],
            loss=next((turns.loss for turns in seen if turns.loss is not None), None),
        )
    return results


def of_system(results: Results, system: System) -> Results:
    """Return the results of one system."""
    return {contender: result for contender, result in results.items() if contender.system == system}


def fastest(results: Results) -> tuple[Contender, Result]:
    """Return who has the shortest step."""
    return min(results.items(), key=lambda item: item[1].step_s)
