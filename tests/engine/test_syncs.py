"""The host waits for its device a few times in a step, however many micro-batches it has."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from itertools import chain, islice
from typing import Any

import pytest
import torch
from deepspeed.accelerator import get_accelerator
from torch import Tensor

from engine.syncs import counting_waits
from engine_jobs import Case, build_engine, micro_batches, show
from gloo_workers import GlooWorkers


def test_what_makes_the_host_wait_is_counted() -> None:
    device = torch.device("cpu")
    values = torch.zeros(3, device=device)
    reads = {
        "item": lambda: values.sum().item(),
        "float": lambda: float(values[0]),
        "bool": lambda: bool(values[0] > 0),
        "isfinite": lambda: torch.isfinite(values.sum()).all() and None,
        "tolist": values.tolist,
        "numpy": values.numpy,
        "cpu": values.cpu,
        "nonzero": values.nonzero,
        "mask": lambda: values[values > 0],
        "assignment by mask": lambda: values.__setitem__(values > 0, torch.ones(0, device=device)),
        "masked_select": lambda: values.masked_select(values > 0),
        "unique": values.unique,
        "equal": lambda: torch.equal(values, values),
        "blocking copy": lambda: torch.zeros(3).to(device),
        "copy to host": lambda: torch.zeros(3).copy_(values),
        "DeepSpeed's timers": lambda: get_accelerator().synchronize(),
        "new tensor": lambda: torch.tensor([1.0], device=device),
    }
    for name, read in reads.items():
        with counting_waits() as devices:
            read()
        assert devices.waits.total() == 1, (name, devices.waits)


def test_what_leaves_the_device_alone_is_not_counted() -> None:
    device = torch.device("cpu")
    values = torch.zeros(3, device=device)
    with counting_waits() as devices:
        host = torch.arange(3)
        assert float(host.sum()) == 3.0
        assert host[host > 1].tolist() == [2]
        moved = host.to(device, non_blocking=True)
        total = (values + moved)[torch.zeros(2, dtype=torch.int64, device=device)].clamp(max=1.0)
        torch.zeros(2).copy_(total, non_blocking=True)
        assert not devices.waits
        assert devices.num_copies == 1
        assert float(host.sum()) == 3.0
        assert not devices.waits
        assert float(moved.sum()) == 3.0
    assert devices.waits.total() == 1


CASES = [
    Case(zero=0, pp=2),
    Case(zero=1, pp=2),
    Case(zero=1, precision="bf16"),
    Case(zero=1, dp=2, precision="bf16"),
    Case(zero=2, dp=2, precision="bf16"),
    Case(zero=3, dp=2, precision="bf16"),
]


@pytest.mark.distributed
@pytest.mark.parametrize("case", CASES, ids=show)
def test_a_step_waits_as_often_whatever_its_number_of_micro_batches(gloo: GlooWorkers, case: Case) -> None:
    check(gloo, case, (4, 8))


@pytest.mark.distributed
def test_a_step_of_64_micro_batches_waits_twice_at_most(gloo: GlooWorkers) -> None:
    check(gloo, Case(zero=1, pp=2, precision="bf16"), (4, 64))


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("case", CASES, ids=show)
def test_so_does_every_step_of_64_micro_batches(gloo: GlooWorkers, case: Case) -> None:
    check(gloo, case, (4, 64))


def check(gloo: GlooWorkers, case: Case, numbers: tuple[int, int]) -> None:
    for waits, more in gloo.run(case.world_size, count_waits, case, numbers):
        assert waits == more
        assert sum(waits.values()) <= 2, waits


def count_waits(rank: int, case: Case, numbers: tuple[int, int]) -> list[dict[str, int]]:
    """Train steps of so many micro-batches; return what made the host wait in each, and how often."""
    waits = []
    for number in numbers:
        engine = build_engine(case, extra=deepspeed_section(case, number))
        data = endless(case, engine.mpu.data_parallel_rank)
        engine.train_batch(islice(data, number))
        # Adam counts its updates in host memory.
        states = engine.view.torch_optimizer.state.values()
        counts = [state["step"] for state in states if isinstance(state.get("step"), Tensor)]
        batches = list(islice(data, number))
        gc.collect()  # the engine before, whose end waits for its device
        with counting_waits() as devices:
            devices.to_host([counts, batches])
            loss, norm = engine.train_batch(iter(batches)), engine.late_grad_norm
        waits.append(dict(devices.waits))
        assert float(loss) > 0.0
        assert norm.read() > case.clip
    return waits


def endless(case: Case, dp_rank: int) -> Iterator[Any]:
    return chain.from_iterable(micro_batches(0, case, dp_rank) for _ in iter(int, 1))


def deepspeed_section(case: Case, num_micro_batches: int) -> dict[str, Any]:
    # Parameters as small as all of these would never be cut.
    sharded = {"zero_optimization": {"stage3_param_persistence_threshold": 0}} if case.zero == 3 else {}
    return {"gradient_accumulation_steps": num_micro_batches, **sharded}
