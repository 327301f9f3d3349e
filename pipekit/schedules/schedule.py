"""Schedule tables: the ordered list of actions of each pipeline rank."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

from pipekit.schedules.action import Action


@dataclass(frozen=True)
class Schedule:
    """Table of a pipeline schedule: the ordered list of actions of each pipeline rank.

    Attributes:
        name: name of the schedule in a configuration.
        num_micro_batches: number of micro-batches per step on one pipeline.
        ranks: the actions of each pipeline rank, in order.
    """

    name: str
    num_micro_batches: int
    ranks: tuple[tuple[Action, ...], ...]

    @cached_property
    def placement(self) -> tuple[int, ...]:
        """The pipeline rank of each stage."""
        rank_of = {action.stage: rank for rank, actions in enumerate(self.ranks) for action in actions}
        return tuple(rank_of[stage] for stage in sorted(rank_of))

    @property
    def num_stages(self) -> int:
        """The number of stages, over all ranks."""
        return len(self.placement)

    def stages_of(self, pipe_rank: int) -> tuple[int, ...]:
        """Return the stages of a pipeline rank."""
        return tuple(stage for stage, rank in enumerate(self.placement) if rank == pipe_rank)

    @cached_property
    def split_backwards(self) -> frozenset[tuple[int, int]]:
        """The stage and the micro-batch of every backward that is split into an input and a weight gradient."""
        return frozenset(
            (action.stage, action.micro_batch) for actions in self.ranks for action in actions if action.kind == "I"
        )

    def peak_in_flight(self, pipe_rank: int) -> int:
        """Peak number of activations that a rank holds; each is that of one stage for one micro-batch.

        A forward adds one, and a whole backward or a weight gradient frees one.

        Example:
            >>> from pipekit.schedules import plan_1f1b
            >>> [plan_1f1b(num_stages=4, num_micro_batches=8).peak_in_flight(rank) for rank in range(4)]
            [4, 3, 2, 1]
        """
        return max(accumulate((action.activation_change for action in self.ranks[pipe_rank]), initial=0))

    def peak_of_stages(self) -> list[int]:
        """Peak number of micro-batches whose activations each stage holds.

        Example:
            >>> from pipekit.schedules import plan_1f1b
            >>> plan_1f1b(num_stages=4, num_micro_batches=8).peak_of_stages()
            [4, 3, 2, 1]
        """
        in_flight, peaks = [0] * self.num_stages, [0] * self.num_stages
        for actions in self.ranks:
            for action in actions:
                in_flight[action.stage] += action.activation_change
                peaks[action.stage] = max(peaks[action.stage], in_flight[action.stage])
        return peaks

    def __str__(self) -> str:
        return "\n".join(" ".join(map(str, actions)) for actions in self.ranks)
