"""What a trial knows of the run that it is part of."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from pipekit.config import Config
from pipekit.distributed.mpu import ModelParallelUnit
from pipekit.plan.plan import Plan
from pipekit.plan.run_folder import RunFolder


@dataclass(frozen=True)
class TrialContext:
    """One rank's view of a run.

    Attributes:
        plan: what was decided before the processes started.
        unit: the process groups, and this rank's place in them.
        device: what this rank computes on.
        folder: the run's files.
        start: the checkpoint that the run goes on from; None where it starts anew.
    """

    plan: Plan
    unit: ModelParallelUnit
    device: torch.device
    folder: RunFolder
    start: Path | None

    @property
    def config(self) -> Config:
        """The resolved configuration."""
        return self.plan.config

    def reduce_mean(self, value: float) -> float:
        """Return the mean over all replicas of what the last stage of each has, on every rank.

        Every rank calls this together; what other stages pass does not count.
        """
        total = torch.tensor(value if self.unit.is_last_stage else 0.0, dtype=torch.float64, device=self.device)
        # Tensor-parallel peers hold the same value.
        dist.all_reduce(total)
        return float(total) / (self.unit.layout.dp * self.unit.layout.tp)
