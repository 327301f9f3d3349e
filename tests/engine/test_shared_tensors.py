"""Optimizers whose ranks hold parts of tensors, and their states in checkpoints, against one process."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from engine_jobs import OPTIMIZERS, VOCAB, Case, build_engine, micro_batches, model_specs, reference_run, save_engine
from gloo_workers import GlooWorkers
from pipekit.checkpoint.reader import CheckpointReader
from pipekit.layers.specs import LayerSpec

pytestmark = pytest.mark.distributed

SAVED, STEPS = 2, 4
COMMON = {"micro_batch_size": 4, "steps": STEPS, "lr": 3e-3}


def perceptron() -> list[LayerSpec]:
    """Layers none of whose gradients is rounding error alone, whose sign would be that of a die."""
    return [
        LayerSpec(nn.Embedding, VOCAB, 32, name="embed"),
        LayerSpec(nn.Linear, 32, 44, name="up"),
        LayerSpec(nn.Tanh),
        LayerSpec(nn.Linear, 44, 32, name="down"),
        LayerSpec(nn.LayerNorm, 32, name="norm"),
        LayerSpec(nn.Linear, 32, VOCAB, name="head"),
    ]


def train_each(rank: int, cases: list[Case], folder: str, whole: bool, goes_on: bool) -> dict[str, dict[str, Tensor]]:
    """Final weights under each case; the first half of the steps is saved, or the second goes on from that."""
    from pipekit.engine.load import load_checkpoint
    from pipekit.engine.tensor_group import join_shards

    found = {}
    for case in cases:
        path = Path(folder) / case.optimizer
        engine = build_engine(case, model_specs(case) if whole else perceptron())
        start = 0
        if goes_on:
            start = load_checkpoint(engine, CheckpointReader(path / f"step-{SAVED:08d}")).step
        for step in range(start, STEPS if goes_on else SAVED):
            engine.train_batch(micro_batches(step, case, engine.mpu.data_parallel_rank))
        if not goes_on:
            save_engine(engine, path, SAVED)
        found[case.optimizer] = {
            name: join_shards(engine.view.full_master(each), each, engine.module.tensor_group).clone()
            for name, each, _ in engine.module.named_logical_parameters()
        }
        engine.destroy()
    return found


def check(
    gloo: GlooWorkers, folder: Path, optimizers: list[str], *, first: Case, then: Case, whole: bool = False
) -> None:
    results: list[dict[str, Any]] = []
    for layout, goes_on in ((first, False), (then, True)):
        cases = [replace(layout, optimizer=name) for name in optimizers]
        results = gloo.run(layout.world_size, train_each, cases, str(folder), whole, goes_on)
    for name in optimizers:
        case = replace(then, optimizer=name)
        expected = reference_run(case, model_specs(case) if whole else perceptron())["weights"]
        held = {}
        for result in results:
            held |= result[name]
        assert held.keys() == expected.keys()
        for parameter, weights in held.items():
            difference = float((weights - expected[parameter]).norm() / expected[parameter].norm())
            assert difference < 1e-4, f"{name}: {parameter} differs by {difference:.1e}"


@pytest.mark.slow
def test_each_trains_under_a_pipeline_and_goes_on_under_zero_3(gloo: GlooWorkers, tmp_path: Path) -> None:
    check(
        gloo,
        tmp_path,
        [*OPTIMIZERS],
        first=Case(pp=2, dp=2, zero=1, **COMMON),  # type: ignore[arg-type]
        then=Case(dp=2, zero=3, **COMMON),  # type: ignore[arg-type]
    )
    manifest = CheckpointReader(tmp_path / "nadam" / f"step-{SAVED:08d}").manifest
    torch_numbers = torch.optim.NAdam(parameters := [nn.Parameter(torch.ones(2))])
    for _ in range(SAVED):
        parameters[0].grad = torch.ones(2)
        torch_numbers.step()
    assert manifest.tensors["up.weight"].numbers["mu_product"] == float(
        torch_numbers.state[parameters[0]]["mu_product"]
    )


def test_norms_and_matrices_are_whole_over_all_ranks(gloo: GlooWorkers, tmp_path: Path) -> None:
    first = Case(tp=2, dp=2, zero=1, **COMMON)  # type: ignore[arg-type]
    check(gloo, tmp_path, ["lamb", "muon"], first=first, then=Case(dp=2, zero=1, **COMMON), whole=True)  # type: ignore[arg-type]


@pytest.mark.slow
def test_norms_and_matrices_are_whole_in_host_memory_and_without_zero(gloo: GlooWorkers, tmp_path: Path) -> None:
    first = Case(tp=2, dp=2, zero=0, **COMMON)  # type: ignore[arg-type]
    then = Case(dp=2, zero=2, offload="optimizer", **COMMON)  # type: ignore[arg-type]
    check(gloo, tmp_path, ["lamb", "muon"], first=first, then=then, whole=True)
