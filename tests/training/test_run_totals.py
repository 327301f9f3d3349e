"""Totals of a run through its starts, and peak memory against the kernel's own count."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from pipekit.config import parse_config
from pipekit.config.growth import batch_size_at, sequence_length_at
from pipekit.layout import Layout
from pipekit.plan.decide import decide_run
from pipekit.plan.plan import Plan
from pipekit.plan.resources import Resources
from pipekit.tensors.host_memory import resident_bytes
from pipekit.training import run_totals
from pipekit.training.language_model import LanguageModelTrial
from pipekit.training.run_totals import PeakMemory, RunTotals

CPU = torch.device("cpu")


def growing(**changes: Any) -> Plan:
    """Plan of a run whose sequences and batches grow."""
    train = {
        "steps": 12,
        "global_batch_size": 8,
        "micro_batch_size": 2,
        "sequence_length": 32,
        "curriculum": {"min_difficulty": 8, "total_curriculum_step": 9},
        "batch_warmup": {"start": 2, "increment": 2, "samples": 30},
    }
    config = parse_config({"model": {"preset": "tiny", "vocab_size": 500}, "train": train})
    plan = decide_run(config, LanguageModelTrial, Resources(world_size=1)).plan
    return replace(plan, sequence_flops=(100.0, 2.0), **changes)


def steps(plan: Plan) -> list[tuple[int, int]]:
    """Sequences of each step, and tokens of each of them."""
    train, position, sizes = plan.config.train, 0, []
    for step in range(1, train.steps + 1):
        sizes.append((batch_size_at(train, position), sequence_length_at(train, step)))
        position += sizes[-1][0]
    return sizes


def test_totals_are_sums_over_all_steps() -> None:
    plan = growing()
    totals, sizes = RunTotals(plan, CPU), steps(plan)
    assert len(set(sizes)) > 4, "sizes grow"
    for step, (number, length) in enumerate(sizes, start=1):
        found, done = totals.add(number, length).metrics(0.5), sizes[:step]
        assert found["samples"] == sum(n for n, _ in done)
        assert found["tokens"] == sum(n * s for n, s in done)
        assert found["flops"] == pytest.approx(sum(n * (100 * s + 2 * s * s) for n, s in done))
        assert found["flops_per_s"] == pytest.approx(number * (100 * length + 2 * length**2) / 0.5)
        assert "mfu" not in found


def test_a_run_that_goes_on_counts_on_from_its_checkpoint() -> None:
    plan = growing()
    sizes = steps(plan)
    whole, first = RunTotals(plan, CPU), RunTotals(plan, CPU)
    expected = [whole.add(*each).metrics(1.0) for each in sizes]
    for each in sizes[:5]:
        stored = first.add(*each).metrics(1.0)
    second = RunTotals(plan, CPU)
    second.go_on(5, stored)
    assert [second.add(*each).metrics(1.0) for each in sizes[5:]] == expected[5:]
    # What the checkpoint tells is counted on from, whatever the configuration says of the steps before.
    second.go_on(5, {"samples": 7, "tokens": 99, "flops": 1.0})
    number, length = sizes[5]
    told = second.add(number, length).metrics(1.0)
    assert (told["samples"], told["tokens"]) == (7 + number, 99 + number * length)
    assert told["flops"] == pytest.approx(1.0 + number * (100 * length + 2 * length**2))
    # A checkpoint of an older version has none.
    second.go_on(5, {"loss": 1.0})
    later = second.add(*sizes[5]).metrics(1.0)
    assert (later["samples"], later["tokens"]) == (expected[5]["samples"], expected[5]["tokens"])


def test_mfu_is_the_share_of_the_peak_of_all_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_totals, "device_peak_flops", lambda device, matmul_format: 1e4)
    found = RunTotals(growing(layout=Layout(pp=2, dp=3)), CPU).add(4, 16).metrics(0.5)
    assert found["mfu"] == pytest.approx(4 * (100 * 16 + 2 * 16**2) / 0.5 / 6e4)


def test_operations_that_are_not_known_are_left_out() -> None:
    totals = RunTotals(replace(growing(), sequence_flops=None), CPU)
    totals.go_on(0, {"flops": 5.0})
    assert totals.add(2, 8).metrics(1.0) == {"samples": 2, "tokens": 16}


def test_the_peak_of_a_process_stays_when_memory_is_freed() -> None:
    memory = PeakMemory(CPU)
    before = memory.measure()
    values = np.ones(30_000_000, dtype=np.uint8)
    during, resident = memory.measure(), resident_bytes()
    del values
    assert memory.measure() >= during >= before
    # The kernel counts some pages late.
    assert during > resident - 2e6


def test_a_rank_is_told_where_its_peak_has_grown() -> None:
    memory = PeakMemory(CPU)
    assert memory.metrics([5, 7]) == {"peak_memory_bytes_rank0": 5, "peak_memory_bytes_rank1": 7}
    assert memory.metrics([5, 8]) == {"peak_memory_bytes_rank1": 8}
    assert memory.metrics([5, 8]) == {}
