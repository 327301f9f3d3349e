"""Low-rank adapters at any layout, against plain torch in one process, and their checkpoints without the base."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from engine_jobs import (
    Case,
    assert_trained_nearly,
    build_engine,
    micro_batches,
    model_specs,
    save_engine,
    show,
    train_plain,
    train_steps,
    training_state,
)
from gloo_workers import COMPILING_TIMEOUT_S, GlooWorkers
from pipekit.layers.lora import add_lora, is_adapter
from pipekit.layers.sequential import SequentialModel
from pipekit.layers.specs import LayerSpec
from pipekit.tensor_parallel import LowRank

pytestmark = pytest.mark.distributed

STEPS = 4
GROUPED = Case(family="llama", num_kv_heads=2, tied=False)


def adapted(case: Case) -> list[LayerSpec]:
    return add_lora(model_specs(case), ["*"], LowRank(rank=3, scale=2.0))


@cache
def reference(case: Case) -> dict[str, Any]:
    model = SequentialModel(adapted(case), seed=1)
    losses, norms = train_plain(model, case, STEPS)
    adapters = {name: each.detach() for name, each in model.logical_tensors().items() if is_adapter(name)}
    return {"losses": losses, "norms": norms, "adapters": adapters}


def job(rank: int, case: Case, options: dict[str, Any]) -> dict[str, Any]:
    from torch._dynamo.utils import counters

    from pipekit.checkpoint.reader import CheckpointReader
    from pipekit.engine.load import load_checkpoint
    from pipekit.engine.save import save_checkpoint
    from pipekit.engine.tensor_group import join_shards

    if case.compile:
        os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"  # no processes of the compiler's own
    engine = build_engine(case, adapted(case))
    view, module = engine.view, engine.module
    if load := options.get("load"):
        assert load_checkpoint(engine, CheckpointReader(Path(load))).step == 2
    losses, norms = train_steps(engine, case, options.get("stop", STEPS))
    adapters: dict[str, Tensor] = {}
    for name, parameter, _ in module.named_logical_parameters():
        assert parameter.requires_grad == is_adapter(name), name
        if parameter.requires_grad:
            whole = join_shards(view.full_master(parameter), parameter, module.tensor_group)
            adapters[name] = whole.to("cpu", copy=True)
        else:
            assert parameter.grad is None, name
    if save := options.get("save"):
        state = replace(training_state(engine, engine.global_steps), base={"path": "base", "fingerprint": "0"})
        save_checkpoint(engine, Path(save), training=state, config_yaml="{}").wait()
    graphs = counters["stats"]["unique_graphs"]
    return {"losses": losses, "norms": norms, "adapters": adapters, "graphs": graphs}


def compare(results: list[dict[str, Any]], case: Case, *, start: int = 0) -> None:
    default = Case()
    expected = reference(replace(default, **{key: getattr(case, key) for key in ("family", "num_kv_heads", "tied")}))
    assert_trained_nearly(results, expected, "adapters", case.precision, start=start)


@pytest.mark.parametrize(
    "case",
    [
        replace(GROUPED, pp=2, tp=2, schedule="zb-h1"),
        pytest.param(replace(GROUPED, pp=2, dp=2, tp=2, schedule="zb-v"), marks=pytest.mark.slow),
        pytest.param(replace(GROUPED, tp=4, sequence_parallel=False), marks=pytest.mark.slow),
        pytest.param(replace(GROUPED, tp=4, dp=1), marks=pytest.mark.slow),
        pytest.param(Case(pp=3, dp=2, zero=0), marks=pytest.mark.slow),
        pytest.param(Case(pp=2, schedule="interleaved-1f1b", checkpointing=True), marks=pytest.mark.slow),
        pytest.param(Case(pp=2, tp=2, precision="bf16"), marks=pytest.mark.slow),
        pytest.param(Case(zero=2, dp=2, tp=2), marks=pytest.mark.slow),
        pytest.param(replace(GROUPED, zero=3, dp=2), marks=pytest.mark.slow),
    ],
    ids=show,
)
def test_adapters_train_as_in_plain_torch(gloo: GlooWorkers, case: Case) -> None:
    compare(gloo.run(case.world_size, job, case, {}), case)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch compiles for CPUs with g++")
def test_compiled_layers_train_their_adapters_too(gloo: GlooWorkers) -> None:
    case = replace(GROUPED, pp=2, compile=True)
    results = gloo.run(case.world_size, job, case, {}, timeout_s=COMPILING_TIMEOUT_S)
    compare(results, case)
    # Halves of a block with adapters, and the first one for inputs without a gradient, each compiled once and whole.
    assert [result["graphs"] for result in results] == [3, 2]


@pytest.mark.parametrize(
    ("writer", "reader"),
    [
        (replace(GROUPED, pp=2, dp=2), replace(GROUPED, tp=2, zero=0)),
        pytest.param(replace(GROUPED, zero=3, dp=2), replace(GROUPED, pp=2, tp=2), marks=pytest.mark.slow),
        pytest.param(replace(GROUPED, pp=2, tp=2), replace(GROUPED, zero=3, dp=4), marks=pytest.mark.slow),
    ],
    ids=show,
)
def test_a_checkpoint_of_adapters_alone_goes_on_at_another_layout(
    gloo: GlooWorkers, tmp_path: Path, writer: Case, reader: Case
) -> None:
    gloo.run(writer.world_size, job, writer, {"save": str(tmp_path), "stop": 2})
    checkpoint = tmp_path / "step-00000002"
    assert sum(file.stat().st_size for file in checkpoint.glob("*.safetensors")) < 3 * 4 * 20_000
    compare(gloo.run(reader.world_size, job, reader, {"load": str(checkpoint)}), reader, start=2)


def test_weights_of_a_checkpoint_are_the_base_of_adapters(gloo: GlooWorkers, tmp_path: Path) -> None:
    gloo.run(1, base_job, Case(), str(tmp_path))


def base_job(rank: int, case: Case, folder: str) -> None:
    from pipekit.checkpoint.reader import CheckpointReader
    from pipekit.engine.load import load_initial_weights

    writer = build_engine(case, model_specs(case))
    writer.train_batch(micro_batches(0, case, 0))
    save_engine(writer, Path(folder), 1)
    engine = build_engine(case, adapted(case))
    before = {name: each.detach().clone() for name, each, _ in engine.module.named_logical_parameters()}
    load_initial_weights(engine, CheckpointReader(Path(folder) / "step-00000001"))
    expected = {name: each.detach() for name, each, _ in writer.module.named_logical_parameters()}
    for name, parameter, _ in engine.module.named_logical_parameters():
        assert torch.equal(parameter, before[name] if is_adapter(name) else expected[name]), name
