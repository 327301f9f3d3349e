"""Totals of a run of layers: samples, tokens and floating-point operations so far, and the peak memory of its ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from pipekit.config.growth import samples_of_steps, tokens_of_steps
from pipekit.costs.sequence_flops import device_peak_flops, flops_of
from pipekit.plan.plan import Plan
from pipekit.tensors.host_memory import peak_resident_bytes


@dataclass(frozen=True)
class StepTotals:
    """Totals after a step, and the step's own operations.

    Attributes:
        samples: sequences so far.
        tokens: tokens of them.
        flops: operations so far; None where they are not known.
        step_flops: those of the step.
        peak_flops: peak of all devices together, in operations per second; None where it is not known.
    """

    samples: int
    tokens: int
    flops: float | None
    step_flops: float
    peak_flops: float | None

    def metrics(self, step_time_s: float) -> dict[str, float]:
        """Return the totals, and the speed of a step that took so many seconds, by the names of `metrics.jsonl`.

        Example:
            >>> StepTotals(8, 1024, 5e9, 1e9, 4e9).metrics(0.5)
            {'samples': 8, 'tokens': 1024, 'flops': 5000000000.0, 'flops_per_s': 2000000000.0, 'mfu': 0.5}
        """
        counts: dict[str, float] = {"samples": self.samples, "tokens": self.tokens}
        if self.flops is None:
            return counts
        per_s = self.step_flops / step_time_s
        share = {} if self.peak_flops is None else {"mfu": per_s / self.peak_flops}
        return {**counts, "flops": self.flops, "flops_per_s": per_s, **share}


class RunTotals:
    """Counts what a run has trained on, through all of its starts. Every rank counts the same.

    Args:
        plan: the run's.
        device: this rank's.
    """

    def __init__(self, plan: Plan, device: torch.device) -> None:
        self._train, self._sequence_flops = plan.config.train, plan.sequence_flops
        peak = device_peak_flops(device, plan.matmul_format)
        peak_flops = None if peak is None else peak * plan.layout.world_size
        self._now = StepTotals(0, 0, None if self._sequence_flops is None else 0.0, 0.0, peak_flops)

    def go_on(self, step: int, metrics: Mapping[str, float]) -> None:
        """Go on after `step` steps, the last of which had these metrics; totals that they lack are counted."""
        train = self._train
        samples = int(metrics.get("samples", samples_of_steps(train, step)))
        tokens = int(metrics.get("tokens", tokens_of_steps(train, step)))
        flops = metrics.get("flops", samples * self._flops_of(train.sequence_length))
        self._now = replace(
            self._now, samples=samples, tokens=tokens, flops=None if self._sequence_flops is None else flops
        )

    def add(self, num_samples: int, length: int) -> StepTotals:
        """Count a step on so many sequences of so many tokens, and return the totals after it."""
        before, flops = self._now, num_samples * self._flops_of(length)
        self._now = replace(
            before,
            samples=before.samples + num_samples,
            tokens=before.tokens + num_samples * length,
            flops=None if before.flops is None else before.flops + flops,
            step_flops=flops,
        )
        return self._now

    def _flops_of(self, length: int) -> float:
        return 0.0 if self._sequence_flops is None else flops_of(self._sequence_flops, length)


class PeakMemory:
    """Peak memory of the ranks: what torch has allocated on GPUs, and the resident memory of the process on CPUs.

    Args:
        device: this rank's.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._largest = 0
        self._told: list[int] = []

    def measure(self) -> int:
        """Bytes of this rank so far; does not wait for its device."""
        is_gpu = self._device.type == "cuda"
        now = torch.cuda.max_memory_allocated(self._device) if is_gpu else peak_resident_bytes()
        # The kernel counts some pages late, so that its peak can fall a little.
        self._largest = max(self._largest, now)
        return self._largest

    def metrics(self, everyones: Sequence[int]) -> dict[str, float]:
        """Return the peaks of those ranks, of all, that have grown since they were last told."""
        before = self._told or [0] * len(everyones)
        self._told = list(everyones)
        return {
            f"peak_memory_bytes_rank{rank}": now
            for rank, (now, then) in enumerate(zip(everyones, before, strict=True))
            if now > then
        }
