"""Timing of a plan: some steps of a run, trained by its ranks and then forgotten."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from pipekit.distributed.processes import gather_objects
from pipekit.files import write_atomically
from pipekit.plan.plan import Plan
from pipekit.tensors.fp32_products import fp32_products
from pipekit.training.console import chatter_to
from pipekit.training.layers_run import LayersRun
from pipekit.training.run import joined, start_trial


@dataclass(frozen=True)
class TimedSteps:
    """Measurement of a run's steps.

    Attributes:
        step_times_s: seconds of each, the first ones included.
        peak_bytes: memory of the fullest rank's device; None on a CPU.
    """

    step_times_s: tuple[float, ...]
    peak_bytes: int | None


def run_timed_rank(
    plan: Plan, result: Path, *, num_steps: int, rank: int, local_rank: int, loopback_port: int | None = None
) -> None:
    """Train some steps as one rank. Nothing is evaluated or saved but the times, as JSON in the file `result`.

    Args:
        plan: the plan.
        result: file that rank 0 writes.
        num_steps: updates.
        rank: the rank.
        local_rank: its number on this machine.
        loopback_port: see `join_processes`.
    """
    torch.set_num_threads(plan.num_threads)
    log = result.parent / f"libraries-{rank}.log"
    with (
        chatter_to(log),
        joined(plan.config, plan.device, local_rank=local_rank, loopback_port=loopback_port) as device,
        fp32_products(device, tf32=plan.config.train.tf32),
    ):
        run = LayersRun(start_trial(plan, device))
        times = [_time_step(run, step) for step in range(num_steps)]
        run.data.close()
        peak_bytes = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
        found = gather_objects((times, peak_bytes))
    if rank == 0:
        # A step ends with the last rank's.
        slowest = tuple(max(step) for step in zip(*(times for times, _ in found), strict=True))
        peaks = [peak for _, peak in found if peak is not None]
        write_atomically(result, json.dumps(asdict(TimedSteps(slowest, max(peaks, default=None)))))


def read_timed_steps(result: Path) -> TimedSteps:
    """Step times that `run_timed_rank` has written."""
    stored = json.loads(result.read_text(encoding="utf-8"))
    return TimedSteps(tuple(stored["step_times_s"]), stored["peak_bytes"])


def _time_step(run: LayersRun, step: int) -> float:
    """Seconds of a step, from its launch to its results."""
    started_s = time.perf_counter()
    run.train_batch(None, 0, step).read()
    if run.run.device.type == "cuda":
        torch.cuda.synchronize(run.run.device)
    return time.perf_counter() - started_s
