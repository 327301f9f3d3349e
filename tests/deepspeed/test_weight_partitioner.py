"""ZeRO-3 built layer by layer and kept in files: the memory that it needs, and that it trains as without."""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import engine_jobs
from engine_jobs import VOCAB, Case, build_engine, micro_batches
from gloo_workers import GlooWorkers
from pipekit.deepspeed.weight_partitioner import check_same_partition
from pipekit.errors import ConfigError
from pipekit.layers.specs import LayerSpec

pytestmark = pytest.mark.distributed

EAGER = {
    "stage3_param_persistence_threshold": 0,
    "stage3_max_live_parameters": 1,
    "stage3_max_reuse_distance": 0,
    "stage3_prefetch_bucket_size": 0,
    "reduce_bucket_size": 2_000_000,
}
"""Fetch each layer for itself, and reduce a layer's gradients at once."""


class First(nn.Linear):
    def forward(self, token_ids: Tensor) -> Tensor:
        return super().forward(F.one_hot(token_ids, VOCAB).float())


class Residual(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


def specs_of(width: int, depth: int) -> list[LayerSpec]:
    hidden = [LayerSpec(Residual, width, width) for _ in range(depth)]
    return [LayerSpec(First, VOCAB, width), *hidden, LayerSpec(nn.Linear, width, VOCAB)]


LARGE = specs_of(1024, 23)


def live_bytes() -> int:
    """Bytes of the tensors that are there."""
    found = [each for each in gc.get_objects() if type(each) in (Tensor, nn.Parameter) and not each.is_meta]
    found += [each.ds_tensor for each in found if hasattr(each, "ds_tensor")]
    storages = (each.untyped_storage() for each in found)
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def test_no_rank_holds_the_whole_model_while_it_is_built(gloo: GlooWorkers) -> None:
    for whole, largest, peak, shapes, expected in gloo.run(2, build_measured):
        # Without partitioning it would be the whole model: twice as much.
        assert whole / 4 < peak <= whole / 2 + 2 * largest
        assert shapes == expected


def build_measured(rank: int) -> tuple[int, int, int, list[Any], list[Any]]:
    from pipekit.engine import module

    specs, sizes = specs_of(256, 8), []
    before, peak, build = live_bytes(), 0, module.build_layer

    def measure(*args: Any, **options: Any) -> nn.Module:
        nonlocal peak
        layer = build(*args, **options)
        sizes.append(sum(4 * parameter.numel() for parameter in layer.parameters()))
        peak = max(peak, live_bytes() - before)
        return layer

    seen: list[Any] = []
    make_optimizer = engine_jobs.make_optimizer

    def make(case: Case, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        seen.extend(tuple(parameter.shape) for parameter in parameters)
        return make_optimizer(case, parameters)

    module.build_layer, engine_jobs.make_optimizer = measure, make  # type: ignore[assignment]
    try:
        build_engine(Case(zero=3, dp=2), specs)
    finally:
        module.build_layer, engine_jobs.make_optimizer = build, make_optimizer
    expected = [tuple(parameter.shape) for spec in specs for parameter in spec.build().parameters()]
    return sum(sizes), max(sizes), peak, seen, expected


def test_an_engine_for_which_the_weights_were_not_cut_is_refused() -> None:
    cut = {"zero_optimization": {"stage": 3}}
    check_same_partition(cut, {"zero_optimization": {"stage": 3}, "train_batch_size": 8})
    with pytest.raises(ConfigError, match=r"cut the weights for ZeRO 3 in float32, and .* ZeRO 1 in bfloat16; give"):
        check_same_partition(cut, {"zero_optimization": {"stage": 1}, "bf16": {"enabled": True}})
    with pytest.raises(ConfigError, match=r"asks for ZeRO 3 in float32 with weights on cpu; give both the same"):
        check_same_partition(cut, {"zero_optimization": {"stage": 3, "offload_param": {"device": "cpu"}}})


def anonymous_bytes() -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("RssAnon"))


@contextmanager
def anonymous_peak() -> Iterator[list[int]]:
    """Most memory, beyond that at its beginning, which the system could not have written to files and dropped."""
    before, found, done = anonymous_bytes(), [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.005):
            found[0] = max(found[0], anonymous_bytes() - before)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield found
    finally:
        done.set()
        thread.join()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "limit_bytes"),
    [
        pytest.param(Case(zero=3, dp=2), 160_000_000, id="zero-3"),
        pytest.param(Case(zero=1, pp=2), 220_000_000, id="pipeline"),
    ],
)
def test_states_larger_than_the_memory_train_from_files(gloo: GlooWorkers, case: Case, limit_bytes: int) -> None:
    # DeepSpeed sums the norm of offloaded gradients in another order: clipping carries its last bit into the losses.
    case = replace(case, micro_batch_size=4, lr=1e-4, clip=0.0)
    in_memory = gloo.run(2, train_measured, case)
    from_files = gloo.run(2, train_measured, replace(case, offload="nvme"))
    # Weights, masters, gradients and two moments in fp32, of which each rank has half.
    states_bytes = 5 * 4 * sum(each.numel() for spec in LARGE for each in spec.build().parameters()) // 2
    for (losses, peak), (expected, larger) in zip(from_files, in_memory, strict=True):
        assert losses == pytest.approx(expected, rel=1e-6)
        assert losses[-1] < losses[0]
        assert peak < limit_bytes < min(states_bytes, larger)


def train_measured(rank: int, case: Case) -> tuple[list[float], int]:
    # What is imported, or kept by allocators, is there already.
    small = build_engine(case, specs_of(64, 4), extra={"zero_optimization": EAGER})
    small.train_batch(micro_batches(0, case, small.mpu.data_parallel_rank))
    small.destroy()
    with anonymous_peak() as peak:
        engine = build_engine(case, LARGE, extra={"zero_optimization": EAGER})
        losses = [float(engine.train_batch(micro_batches(0, case, engine.mpu.data_parallel_rank))) for _ in range(3)]
    return losses, peak[0]
