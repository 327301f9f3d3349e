"""Batch arithmetic: `global_batch_size = micro_batch_size * num_micro_batches * dp`, in sequences."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from pipekit.config.rules import batch_fault
from pipekit.errors import ConfigError

if TYPE_CHECKING:
    from pipekit.config.schema import Config


@dataclass(frozen=True)
class BatchPlan:
    """Division of one optimizer step's sequences into micro-batches and data-parallel ranks."""

    micro_batch_size: int
    """Sequences that one rank computes at a time."""

    num_micro_batches: int
    """Micro-batches that each pipeline computes in one step."""

    dp: int
    """Data-parallel degree."""

    @property
    def global_batch_size(self) -> int:
        """Sequences per optimizer step, over all ranks."""
        return self.micro_batch_size * self.num_micro_batches * self.dp


def plan_batch(config: Config, dp: int) -> BatchPlan:
    """Divide a step's sequences into micro-batches on `dp` data-parallel ranks.

    Raises:
        ConfigError: if `train.global_batch_size` is not a multiple of `train.micro_batch_size * dp`.
    """
    train = config.train
    if fault := batch_fault(train, dp):
        raise ConfigError(fault.message)
    return BatchPlan(train.micro_batch_size, train.global_batch_size // (train.micro_batch_size * dp), dp)
