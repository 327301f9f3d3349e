"""Contenders take turns: each does one step a round, so that noise on the machine hits all alike."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Literal

from pipelines.ranks import Say

System = Literal["DeepSpeed", "torch", "pipekit", "limit"]

Step = Callable[[], float | None]
"""Trains on one global batch, and returns the loss on the ranks that know it."""


@dataclass(frozen=True)
class Contender:
    """What is measured.

    Attributes:
        system: whose pipeline.
        schedule: its schedule.
        cut: how the layers are divided: a partitioner's name, or the first layer of each stage but the first.
    """

    system: System
    schedule: str
    cut: str = ""

    def __str__(self) -> str:
        return " ".join(part for part in (self.system, self.schedule, self.cut and f"cut {self.cut}") if part)


@dataclass
class Turns:
    """What one rank saw of a contender.

    Attributes:
        spans_s: begin and end of each step, by a clock that all processes of a machine share.
        loss: of the last step, on the ranks that know it.
    """

    spans_s: list[tuple[float, float]]
    loss: float | None = None


def take_turns(steps: Mapping[Contender, Step], rounds: int, say: Say) -> dict[Contender, Turns]:
    """Run each contender once to warm up, then once in each round, beginning each round with the next of them.

    Every rank calls this with the same contenders in the same order.
    """
    import torch.distributed as dist

    order = list(steps)
    turns = {contender: Turns([]) for contender in order}
    for contender, step in steps.items():
        say(f"warm-up of {contender}")
        dist.barrier()
        step()
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


def step_times_s(ranks: Sequence[Mapping[Contender, Turns]], contender: Contender) -> list[float]:
    """Return how long each round's step took: from the first rank's begin to the last rank's end."""
    rounds = zip(*(rank[contender].spans_s for rank in ranks), strict=True)
    return [max(end for _, end in spans) - min(begin for begin, _ in spans) for spans in rounds]


def rank_times_s(ranks: Sequence[Mapping[Contender, Turns]], contender: Contender) -> list[float]:
    """Return the median over the rounds of each rank's own time."""
    return [median(end - begin for begin, end in rank[contender].spans_s) for rank in ranks]


def last_loss(ranks: Sequence[Mapping[Contender, Turns]], contender: Contender) -> float | None:
    """Return the loss of the last step, from a rank that knows it."""
    return next((rank[contender].loss for rank in ranks if rank[contender].loss is not None), None)
