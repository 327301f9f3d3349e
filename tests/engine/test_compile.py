"""Compiled layers against one process that compiles nothing."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from typing import Any

import pytest

from engine_jobs import Case, assert_trained_as_one_process, show, train_job
from gloo_workers import COMPILING_TIMEOUT_S, GlooWorkers

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.skipif(shutil.which("g++") is None, reason="torch compiles for CPUs with g++"),
]


def compiled_job(rank: int, case: Case) -> dict[str, Any]:
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"  # no processes of the compiler's own
    from torch._dynamo.utils import counters

    result = train_job(rank, case, {})
    assert (counters["stats"]["unique_graphs"] > 0) == case.compile
    return result


def run(gloo: GlooWorkers, case: Case) -> list[dict[str, Any]]:
    return gloo.run(case.world_size, compiled_job, case, timeout_s=COMPILING_TIMEOUT_S)


def check(gloo: GlooWorkers, case: Case) -> None:
    assert_trained_as_one_process(run(gloo, replace(case, compile=True)), case)


@pytest.mark.slow
def test_compiled_layers_put_weight_gradients_off_and_train_as_uncompiled_ones(gloo: GlooWorkers) -> None:
    check(gloo, Case(schedule="zb-h1", steps=2))


@pytest.mark.slow
@pytest.mark.parametrize(
    "case",
    [
        Case(dp=2),
        Case(checkpointing=True),
        Case(pp=2, schedule="zb-h1"),
        Case(pp=2, schedule="zb-v", checkpointing=True),
        Case(tp=2),
        Case(tp=2, sequence_parallel=False, checkpointing=True),
        Case(tp=2, pp=2, schedule="zb-h1"),
        Case(tp=2, num_kv_heads=1),
        Case(family="gpt_neox", tied=False),
        Case(zero=2, dp=2),
    ],
    ids=show,
)
def test_compiled_layers_train_as_one_process_does(gloo: GlooWorkers, case: Case) -> None:
    check(gloo, replace(case, steps=4))


@pytest.mark.slow
@pytest.mark.parametrize("case", [Case(), Case(checkpointing=True), Case(pp=2, schedule="zb-h1"), Case(tp=2)], ids=show)
def test_compiled_layers_draw_the_dropout_of_uncompiled_ones(gloo: GlooWorkers, case: Case) -> None:
    case = replace(case, dropout=0.2, steps=4)
    expected, found = (run(gloo, replace(case, compile=compiled))[0] for compiled in (False, True))
    assert found["losses"] == pytest.approx(expected["losses"], rel=1e-4)
    assert found["norms"] == pytest.approx(expected["norms"], rel=1e-4)
