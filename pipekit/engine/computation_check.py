"""Computation check: a step computed twice from the same state gives the same bits, or some rank computes wrongly."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from pipekit.distributed.processes import gather_objects
from pipekit.engine.consistency_check import sum_bits
from pipekit.engine.micro_batches import MicroBatch
from pipekit.engine.step_trace import StepTrace, gather_first
from pipekit.engine.training_engine import TrainingEngine
from pipekit.errors import NumbersError


def train_batch_checked(engine: TrainingEngine, batches: Iterator[MicroBatch] | None) -> Tensor:
    """Train on one global batch, and compute it twice: the update is made only if both are equal, bit for bit.

    Compared on each rank are checksums of what its layers take and return, and of all gradients of these and of its
    weights, of every micro-batch. The sums of gradients over replicas are not: replicas that differ are what
    `check_consistency` finds. All ranks call this together.

    Args:
        engine: what to train.
        batches: this rank's micro-batches.

    Returns:
        The mean loss over the global batch before the update.

    Raises:
        NumbersError: on every rank, with the first tensor that differs, before anything is updated.
    """
    held = None if batches is None else list(batches)
    first, second = (StepTrace(engine, _digest, with_parts=False) for _ in range(2))

    def compare() -> None:
        before, now = first.results(), second.results()
        differing = [place for place in before | now if before.get(place) != now.get(place)]
        fault = gather_first(engine, differing)
        if fault is None:
            return
        host = gather_objects(platform.node())[fault.rank]
        raise NumbersError(
            f"step {engine.global_steps + 1}, computed twice from the same state, differs: first in {fault}, on "
            f"host {host}. Most often that machine or its device is at fault: leave it out, and start the same command "
            "again; or, where it happens on several, an operation differs each time, such as one that draws from a "
            "generator of its own: then set train.check_computation=null"
        )

    with _deterministic(engine.device):
        with engine.computing_again(engine.global_steps), first.watching():
            engine.train_batch(_iterate(held))
        engine.before_update = compare
        try:
            with second.watching():
                return engine.train_batch(_iterate(held))
        finally:
            engine.before_update = None


def _iterate(held: list[Any] | None) -> Iterator[Any] | None:
    return None if held is None else iter(held)


def _digest(tensor: Tensor, has_gradient: bool) -> Tensor:
    return sum_bits(tensor)


@contextmanager
def _deterministic(device: torch.device) -> Iterator[None]:
    """Let GPUs add in the same order each time, where they can; CPUs do."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    if device.type == "cuda":
        torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
