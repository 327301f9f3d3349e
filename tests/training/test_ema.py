"""The moving average of the weights, against one computed from the whole weights after each step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from engine_jobs import Case, build_engine, compiling_adam, micro_batches, show, training_state
from gloo_workers import GlooWorkers
from pipekit.checkpoint.manifest import TrainingState
from pipekit.checkpoint.reader import CheckpointReader

pytestmark = pytest.mark.distributed

DECAY = 0.5
STEPS = 4
CASES = [
    Case(pp=2, dp=2, zero=1),
    Case(dp=2, zero=3, precision="bf16"),
    pytest.param(Case(zero=0), marks=pytest.mark.slow),
    pytest.param(Case(tp=2, dp=2, zero=1, precision="bf16"), marks=pytest.mark.slow),
    pytest.param(Case(dp=2, zero=2), marks=pytest.mark.slow),
    pytest.param(Case(dp=2, zero=2, offload="optimizer"), marks=pytest.mark.slow),
    pytest.param(Case(zero=0, optimizer="sgd"), marks=pytest.mark.slow),
]


def build(case: Case) -> Any:
    from pipekit.training.ema import track_ema

    engine = build_engine(case)
    track_ema(engine.view.torch_optimizer, DECAY)
    return engine


def masters(engine: Any) -> dict[str, Tensor]:
    named = engine.module.named_logical_parameters()
    return {name: engine.view.full_master(parameter).cpu().clone() for name, parameter, _ in named}


def averages(engine: Any) -> dict[str, Tensor]:
    named = engine.module.named_logical_parameters()
    return {name: engine.view.full_state(parameter, "ema").cpu().clone() for name, parameter, _ in named}


def evaluate(engine: Any, case: Case) -> float:
    return float(engine.eval_batch(micro_batches(99, case, engine.mpu.data_parallel_rank)))


def follow(rank: int, case: Case, folder: str) -> None:
    from pipekit.engine.load import load_checkpoint
    from pipekit.engine.save import save_checkpoint
    from pipekit.training.ema import ema_weights

    engine = build(case)
    with ema_weights(engine):  # before the first update there is none
        pass
    expected: dict[str, Tensor] = {}
    for step in range(STEPS):
        engine.train_batch(micro_batches(step, case, engine.mpu.data_parallel_rank))
        for name, weights in masters(engine).items():
            expected[name] = expected[name] * DECAY + weights * (1 - DECAY) if name in expected else weights
    engine.view.state_names()
    found = averages(engine)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-6, atol=1e-7)

    # In place of the weights, and back to the bit.
    before, plain = masters(engine), evaluate(engine, case)
    with ema_weights(engine):
        averaged = evaluate(engine, case)
        assert all(torch.equal(weights, found[name]) for name, weights in masters(engine).items())
    assert evaluate(engine, case) == plain != averaged
    assert all(torch.equal(weights, before[name]) for name, weights in masters(engine).items())
    assert all(torch.equal(average, found[name]) for name, average in averages(engine).items())

    # It is saved, and goes on from what was saved.
    path = save_checkpoint(engine, Path(folder), training=training_state(engine, STEPS), config_yaml="{}\n").wait()
    again = build(case)
    load_checkpoint(again, CheckpointReader(path))
    assert all(torch.equal(average, found[name]) for name, average in averages(again).items())
    for each in (engine, again):
        each.train_batch(micro_batches(STEPS, case, engine.mpu.data_parallel_rank))
    theirs = averages(again)
    assert all(torch.equal(average, theirs[name]) for name, average in averages(engine).items())

    # The average can be left behind.
    without = build_engine(case)
    load_checkpoint(without, CheckpointReader(path), without_states=["ema"])
    assert "ema" not in without.view.state_names()


@pytest.mark.parametrize("case", CASES, ids=show)
def test_it_follows_the_weights_under_every_zero_stage(gloo: GlooWorkers, tmp_path: Path, case: Case) -> None:
    gloo.run(case.world_size, compiling_adam, follow, case, str(tmp_path))
    reader = CheckpointReader(tmp_path / f"step-{STEPS:08d}")
    assert isinstance(reader.manifest.training, TrainingState)
    assert all("ema" in entry.files for entry in reader.manifest.tensors.values() if entry.trainable)
