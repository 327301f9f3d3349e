"""Context of a trial of layers: one rank's view of the run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from pipekit.config import Config
from pipekit.distributed.mpu import ModelParallelUnit
from pipekit.layers.specs import LayerSpec
from pipekit.plan.plan import Plan
from pipekit.plan.run_folder import RunFolder


@dataclass(frozen=True)
class RunContext:
    """One rank's view of a run.

    Attributes:
        plan: every decision of the run.
        specs: the whole model's layers.
        mpu: the process groups, and this rank's place in them.
        device: device of this rank.
        folder: files of the run.
    """

    plan: Plan
    specs: Sequence[LayerSpec]
    mpu: ModelParallelUnit
    device: torch.device
    folder: RunFolder

    @property
    def start(self) -> Path | None:
        """The checkpoint that the run resumes from; None if it starts from the beginning."""
        return None if self.plan.start is None else self.plan.start.checkpoint

    @property
    def config(self) -> Config:
        """The resolved configuration."""
        return self.plan.config

    def reduce_mean(self, value: float) -> float:
        """Return the mean of the last stages' values over all replicas, on every rank.

        All ranks call this together; values from other stages are ignored.
        """
        total = torch.tensor(value if self.mpu.is_last_stage else 0.0, dtype=torch.float64, device=self.device)
        # Tensor-parallel peers hold the same value.
        dist.all_reduce(total)
        return float(total) / (self.mpu.layout.dp * self.mpu.layout.tp)
