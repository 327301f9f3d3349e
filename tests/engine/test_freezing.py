"""Frozen parameters at any layout, against plain torch with `requires_grad=False`."""

from __future__ import annotations

from dataclasses import replace
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from engine_jobs import (
    Case,
    assert_trained_nearly,
    build_engine,
    model_specs,
    save_engine,
    show,
    train_plain,
    train_steps,
)
from gloo_workers import GlooWorkers
from pipekit.layers.freezing import freeze
from pipekit.layers.sequential import SequentialModel

pytestmark = pytest.mark.distributed

EMBEDDING = ("embed.weight",)
FIRST_HALF = ("embed.*", "position.*", "blocks.0.*", "blocks.1.*")
LAST_HALF = ("blocks.1.mlp.*", "blocks.2.*", "final_norm.*", "embed.*")
BIASES = ("*.bias", "blocks.1.attention.qkv.weight")
STEPS = 4


def is_frozen(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


@cache
def reference(case: Case, patterns: tuple[str, ...]) -> dict[str, Any]:
    model = SequentialModel(model_specs(case), seed=1)
    tensors = model.logical_tensors()
    for name, tensor in tensors.items():
        tensor.requires_grad_(not is_frozen(name, patterns))
    losses, norms = train_plain(model, case, STEPS)
    return {"losses": losses, "norms": norms, "weights": {name: each.detach() for name, each in tensors.items()}}


def job(rank: int, case: Case, patterns: tuple[str, ...], options: dict[str, Any]) -> dict[str, Any]:
    from pipekit.checkpoint.reader import CheckpointReader
    from pipekit.engine.load import load_checkpoint
    from pipekit.engine.tensor_group import join_shards

    engine = build_engine(case, freeze(model_specs(case), patterns))
    view, module = engine.view, engine.module
    named = [(name, parameter) for name, parameter, _ in module.named_logical_parameters()]
    if load := options.get("load"):
        assert load_checkpoint(engine, CheckpointReader(Path(load))).step == 2
    before = {name: view.full_frozen(each).clone() for name, each in named}
    losses, norms = train_steps(engine, case, options.get("stop", STEPS))
    optimized = {id(each) for group in view.param_groups for each in group["params"]}
    weights = {}
    for name, parameter in named:
        frozen = is_frozen(name, patterns)
        assert parameter.requires_grad != frozen, name
        assert not frozen or (parameter.grad is None and id(parameter) not in optimized), name
        assert torch.equal(view.full_frozen(parameter), before[name]) or not frozen, name
        whole = view.full_frozen(parameter) if frozen else view.full_master(parameter)
        weights[name] = join_shards(whole, parameter, module.tensor_group).to("cpu", copy=True)
    if save := options.get("save"):
        save_engine(engine, Path(save), engine.global_steps)
    return {"losses": losses, "norms": norms, "weights": weights}


def compare(results: list[dict[str, Any]], case: Case, patterns: tuple[str, ...], *, start: int = 0) -> None:
    expected = reference(replace(Case(), clip=case.clip), patterns)
    assert_trained_nearly(results, expected, "weights", case.precision, start=start)


@pytest.mark.parametrize(
    ("case", "patterns"),
    [
        (Case(pp=2, dp=2), EMBEDDING),
        (Case(pp=2, zero=0), EMBEDDING),
        (Case(pp=2, schedule="zb-v", tp=2), FIRST_HALF),
        pytest.param(Case(pp=3, schedule="zb-h1", zero=0), FIRST_HALF, marks=pytest.mark.slow),
        pytest.param(Case(pp=2, schedule="interleaved-1f1b"), FIRST_HALF, marks=pytest.mark.slow),
        pytest.param(Case(pp=2, dp=2, schedule="gpipe", checkpointing=True), LAST_HALF, marks=pytest.mark.slow),
        pytest.param(Case(pp=3, schedule="auto", dp=1), LAST_HALF, marks=pytest.mark.slow),
        (Case(pp=2, tp=2, precision="bf16"), BIASES),
        (Case(zero=2, dp=2), BIASES),
        (Case(zero=3, dp=2), FIRST_HALF),
    ],
    ids=lambda value: show(value) if isinstance(value, Case) else value[0],
)
def test_frozen_parameters_stay_and_the_others_train_as_in_plain_torch(
    gloo: GlooWorkers, case: Case, patterns: tuple[str, ...]
) -> None:
    compare(gloo.run(case.world_size, job, case, patterns, {}), case, patterns)


@pytest.mark.parametrize("schedule", ["1f1b", "gpipe", "zb-h1", "zb-v", "interleaved-1f1b", "auto"])
@pytest.mark.parametrize("patterns", [EMBEDDING, FIRST_HALF, LAST_HALF], ids=lambda patterns: patterns[0])
@pytest.mark.parametrize("zero", [0, 1])
@pytest.mark.slow
def test_every_schedule_runs_stages_of_which_nothing_is_trained(
    gloo: GlooWorkers, schedule: str, patterns: tuple[str, ...], zero: int
) -> None:
    case = Case(pp=3 if schedule in ("1f1b", "gpipe", "zb-h1", "auto") else 2, schedule=schedule, zero=zero)
    compare(gloo.run(case.world_size, job, case, patterns, {}), case, patterns)


@pytest.mark.parametrize(
    ("writer", "reader"),
    [
        (Case(pp=2, zero=0), Case(zero=2, dp=2)),
        pytest.param(Case(pp=2, dp=2), Case(pp=3), marks=pytest.mark.slow),
        (Case(zero=3, dp=2), Case(pp=2, tp=2, zero=0)),
    ],
    ids=show,
)
def test_a_checkpoint_goes_on_at_another_layout(gloo: GlooWorkers, tmp_path: Path, writer: Case, reader: Case) -> None:
    gloo.run(writer.world_size, job, writer, FIRST_HALF, {"save": str(tmp_path), "stop": 2})
    load = {"load": str(tmp_path / "step-00000002")}
    compare(gloo.run(reader.world_size, job, reader, FIRST_HALF, load), reader, FIRST_HALF, start=2)


@pytest.mark.parametrize(
    "reader", [Case(pp=2), Case(pp=2, zero=0), pytest.param(Case(zero=3, dp=2), marks=pytest.mark.slow)], ids=show
)
def test_a_checkpoint_goes_on_with_other_frozen_parameters(gloo: GlooWorkers, tmp_path: Path, reader: Case) -> None:
    gloo.run(2, job, Case(pp=2), FIRST_HALF, {"save": str(tmp_path), "stop": 2})
    results = gloo.run(2, job, reader, LAST_HALF, {"load": str(tmp_path / "step-00000002")})
    expected = reference(Case(), FIRST_HALF)
    for result in results:
        assert result["losses"][0] == pytest.approx(expected["losses"][2], rel=1e-4)
        assert result["losses"][1] != pytest.approx(expected["losses"][3], rel=1e-4)
