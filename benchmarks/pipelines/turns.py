"""Contenders take turns: each does one step a round, so that noise on the machine hits all alike."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Literal

from pipekit.schedules import Schedule
from pipelines.ranks import Say

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
    """What one rank saw of a contender.

    Attributes:
        spans_s: begin and end of each step, by a clock that all processes of a machine share.
        loss: of the last step, on the ranks that know it.
    """

    spans_s: list[tuple[float, float]] = field(default_factory=list)
    loss: float | None = None


def take_turns(steps: Mapping[Contender, Step], rounds: int, say: Say) -> dict[Contender, Turns]:
    """Run each contender once to warm up, then once in each round, beginning each round with the next of them.

    Every rank calls this with the same contenders in the same order.
    """
    import torch.distributed as dist

    for contender, step in steps.items():
        say(f"warm-up of {contender}")
        dist.barrier()
        step()
    order = list(steps)
    turns = {contender: Turns() for contender in order}
    for index in range(rounds):
        first = index % len(order)
        for contender in order[first:] + order[:first]:
            say(f"round {index + 1} of {rounds}, {contender}")
            gc.collect()
            dist.barrier()
            begin_s = time.monotonic()
            turns[contender].loss = steps[contender]()
            turns[contender].spans_s.append((begin_s, time.monotonic()))
    return turns


@dataclass(frozen=True)
class Result:
    """What a contender was measured at.

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


def combine(ranks: Sequence[Mapping[Contender, Turns]]) -> Results:
    """Return each contender's result from what each rank saw."""
    results: Results = {}
    for contender in ranks[0]:
        seen = [rank[contender] for rank in ranks]
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
