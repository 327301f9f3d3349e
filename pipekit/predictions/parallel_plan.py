"""One way to run a model in parallel: layout, ZeRO stage, schedule, micro-batches and activation checkpointing."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

from pipekit.layout import Layout
from pipekit.schedules import SCHEDULE_NAMES, Schedule, plan_schedule
from pipekit.settings.activations import ActivationCheckpointing

# A table of more actions is planned for fewer micro-batches: a step grows by the same with each beyond some.
_MOST_ACTIONS = 4_000


@dataclass(frozen=True)
class ParallelPlan:
    """A layout with all options that decide the time and the memory of a step.

    Attributes:
        layout: the grid of ranks.
        zero: ZeRO stage.
        schedule: its name, or the path of a table.
        stages_per_rank: stages on each pipeline rank.
        micro_batch_size: sequences that one rank computes at a time.
        num_micro_batches: micro-batches of a step on each pipeline.
        checkpointing: of activations; None keeps all of them for the backward.
        max_in_flight: for `auto`, the stage activations that a rank may hold.
        sequence_parallel: whether tensor-parallel ranks hold shards of what passes between layers.
    """

    layout: Layout
    zero: int
    schedule: str
    stages_per_rank: int
    micro_batch_size: int
    num_micro_batches: int
    checkpointing: ActivationCheckpointing | None
    max_in_flight: int | None = None
    sequence_parallel: bool = True

    @property
    def global_batch_size(self) -> int:
        """Sequences of a step."""
        return self.micro_batch_size * self.num_micro_batches * self.layout.dp

    @property
    def num_stages(self) -> int:
        """Stages of the pipeline."""
        return self.layout.pp * self.stages_per_rank

    @property
    def actions_per_micro_batch(self) -> int:
        """Upper bound on the actions of the schedule for each micro-batch."""
        return 3 * self.num_stages

    def __str__(self) -> str:
        stages = f" x {self.stages_per_rank}" if self.stages_per_rank > 1 else ""
        kept = "" if self.checkpointing is None else f", {self.checkpointing}"
        batches = "micro-batch" if self.num_micro_batches == 1 else "micro-batches"
        return (
            f"{self.layout}, ZeRO {self.zero}, {self.schedule}{stages}, {self.num_micro_batches:,} {batches} of "
            f"{self.micro_batch_size}{kept}"
        )

    def written(self) -> dict[str, Any]:
        """Keys of a configuration that has this layout, such as `parallel.pp`, with their values."""
        return {
            "parallel.pp": self.layout.pp,
            "parallel.dp": self.layout.dp,
            "parallel.tp": self.layout.tp,
            "parallel.zero": self.zero,
            "parallel.schedule": self.schedule,
            "train.micro_batch_size": self.micro_batch_size,
            "train.activation_checkpointing": self.checkpointing is not None and self.checkpointing.written(),
        }

    def plan_schedules(self) -> tuple[Schedule, Schedule | None]:
        """Table of a step, or, where that has very many actions, those of two steps with fewer micro-batches.

        Returns:
            The table, and where it leaves micro-batches out, one with still fewer: one for each pipeline rank.

        Raises:
            ConfigError: if the schedule cannot run so.
        """
        pp, num_micro_batches = self.layout.pp, self.num_micro_batches
        stages, most = self.stages_per_rank, self.max_in_flight
        plan = partial(plan_schedule, self.schedule, pp=pp, stages_per_rank=stages, max_in_flight=most)
        # What is left out is a multiple of the ranks, as interleaving asks.
        fewer = 3 * pp + num_micro_batches % pp
        is_long = num_micro_batches > fewer and num_micro_batches * self.actions_per_micro_batch > _MOST_ACTIONS
        # Under GPipe every micro-batch more is held, and a file has the micro-batches that it has.
        if not is_long or self.schedule == "gpipe" or self.schedule not in SCHEDULE_NAMES:
            return plan(num_micro_batches=num_micro_batches), None
        return plan(num_micro_batches=fewer), plan(num_micro_batches=fewer - pp)
