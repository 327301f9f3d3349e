"""Losses on a GPU against plain torch on a CPU, and against each other where arithmetic must be the same."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from engine_jobs import Case, assert_trained_as_one_process, reference, show, train
from gpu_workers import compute_repeatably, on_cpu, on_gpus, own_device, workers_on
from pipekit.settings.activations import ActivationCheckpointing

pytestmark = pytest.mark.distributed

TOLERANCE = {"cpu": 1e-4, "cuda": 2e-3}
DEVICES = [on_cpu("cpu"), on_gpus(1, "cuda")]


def job(rank: int, device: str, case: Case, options: dict[str, Any]) -> dict[str, Any]:
    """Train the same bits in every run."""
    compute_repeatably()
    return train(rank, case, device=own_device(device), **options)


def run(device: str, case: Case, **options: Any) -> list[dict[str, Any]]:
    return workers_on(device).run(case.world_size, job, device, case, options)


@pytest.mark.parametrize(
    ("device", "case"),
    [
        on_cpu("cpu", Case(precision="bf16", steps=5)),
        on_gpus(1, "cuda", Case(precision="bf16", steps=20, preset="gpt2", lr=2e-5)),
    ],
    ids=["cpu", "cuda"],
)
def test_bf16_losses_follow_those_of_fp32_in_plain_torch(device: str, case: Case) -> None:
    (result,) = run(device, case)
    assert result["losses"] == pytest.approx(reference(case)["losses"], rel=2e-2)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "case", [Case(schedule="interleaved-1f1b"), Case(schedule="zb-h1"), Case(schedule="zb-v")], ids=show
)
def test_several_stages_on_one_rank_and_split_backwards_train_as_one_process_does(device: str, case: Case) -> None:
    assert_trained_as_one_process(run(device, case), case, TOLERANCE[device])


@pytest.mark.parametrize("device", DEVICES)
def test_recomputed_dropout_is_that_of_the_forward_to_the_bit(device: str) -> None:
    case = Case(dropout=0.2, steps=4)
    (plain,) = run(device, case)
    (without,) = run(device, replace(case, dropout=0.0))
    for form in (
        ActivationCheckpointing(),
        ActivationCheckpointing(offload=True),
        ActivationCheckpointing(only="attention"),
    ):
        (recomputed,) = run(device, replace(case, checkpointing=form))
        assert recomputed["losses"] == plain["losses"] != without["losses"], form
        assert recomputed["norms"] == plain["norms"], form


@pytest.mark.parametrize(
    ("device", "case"),
    [
        on_cpu("cpu", Case(zero=2)),
        *[
            on_gpus(1, "cuda", case)
            for case in (
                Case(zero=2),
                Case(zero=3),
                Case(zero=1, offload="optimizer"),
                Case(zero=3, offload="parameters"),
            )
        ],
    ],
    ids=lambda value: show(value) if isinstance(value, Case) else value,
)
def test_zero_stages_and_offload_train_as_one_process_does(device: str, case: Case) -> None:
    assert_trained_as_one_process(run(device, case), case, TOLERANCE[device])


@pytest.mark.parametrize("device", [on_gpus(1, "cuda")])
@pytest.mark.parametrize("zero", [1, 2, 3])
def test_fp16_losses_follow_those_of_fp32(device: str, zero: int) -> None:
    case = Case(precision="fp16", zero=zero, lr=1e-3, steps=30)
    (result,) = run(device, case)
    # Its loss scale starts high, so that the first steps are skipped.
    assert result["losses"][0] == pytest.approx(reference(case)["losses"][0], rel=1e-2)
    assert result["losses"][-1] < result["losses"][0]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_resumed_run_has_the_losses_of_one_that_went_on(tmp_path: Path, device: str, precision: str) -> None:
    case = Case(precision=precision, steps=6)
    (whole,) = run(device, case, save=str(tmp_path), save_after=3)
    (checkpoint,) = [path for path in tmp_path.iterdir() if path.is_dir()]
    (resumed,) = run(device, case, load=str(checkpoint))
    assert resumed["losses"] == whole["losses"][3:]
    assert resumed["norms"] == whole["norms"][3:]
