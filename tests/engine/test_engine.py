"""The engine against one process that uses nothing but torch."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from engine_jobs import Case, assert_trained_as_one_process, reference, show, train_job
from gloo_workers import GlooWorkers

pytestmark = pytest.mark.distributed

LAYOUTS = [
    Case(pp=1, zero=0),
    Case(pp=2, zero=0),
    Case(pp=2, zero=1),
    Case(pp=4, zero=1),
    Case(pp=4, zero=0, micro_batch_size=2),
    Case(pp=2, dp=2, zero=1),
    Case(pp=2, dp=2, zero=0, micro_batch_size=2),
    Case(pp=1, dp=4, zero=1),
]


def run(gloo: GlooWorkers, case: Case, **options: Any) -> list[dict[str, Any]]:
    return gloo.run(case.world_size, train_job, case, options)


def check_against_reference(gloo: GlooWorkers, case: Case) -> None:
    assert_trained_as_one_process(run(gloo, case), case)


@pytest.mark.parametrize("case", LAYOUTS, ids=show)
def test_fp32_trains_as_one_process_does(gloo: GlooWorkers, case: Case) -> None:
    check_against_reference(gloo, case)


@pytest.mark.parametrize(
    "case",
    [
        Case(pp=2, zero=0, tied=False),
        Case(pp=4, zero=1, tied=False),
        Case(pp=2, dp=2, zero=1, tied=False),
        Case(pp=2, zero=0, clip=0.0),
        Case(pp=2, zero=1, optimizer="sgd"),
        Case(pp=4, zero=1, checkpointing=True),
    ],
    ids=show,
)
def test_untied_unclipped_sgd_and_checkpointing_too(gloo: GlooWorkers, case: Case) -> None:
    check_against_reference(gloo, case)


def test_the_reference_learns_and_is_clipped() -> None:
    expected = reference(Case(steps=7))
    assert expected["losses"][-1] < 0.8 * expected["losses"][0]
    assert min(expected["norms"]) > 0.5


def test_stages_with_other_parameter_groups_or_with_none(gloo: GlooWorkers) -> None:
    # Alone on its stage, the final norm has no matrices, and the tied head owns nothing; DeepSpeed's norm would hang.
    case = Case(pp=4, zero=1, boundaries=(0, 5, 8, 9, 10))
    check_against_reference(gloo, case)
    check_against_reference(gloo, Case(pp=4, zero=0, boundaries=(0, 5, 8, 9, 10)))


@pytest.mark.parametrize("precision", ["bf16", pytest.param("fp16", marks=pytest.mark.slow)])
def test_16_bit_training_stays_near_fp32_under_every_layout(gloo: GlooWorkers, precision: str) -> None:
    expected = reference(Case())
    runs = [
        run(gloo, case)[0]
        for case in (
            Case(pp=1, zero=0, precision=precision),
            Case(pp=2, zero=1, precision=precision),
            Case(pp=2, dp=2, zero=1, precision=precision),
            Case(pp=4, zero=0, precision=precision, boundaries=(0, 5, 8, 9, 10)),
        )
    ]
    for result in runs:
        assert result["losses"] == pytest.approx(expected["losses"], rel=0.02)
        assert result["norms"] == pytest.approx(expected["norms"], rel=0.05)
        assert result["losses"] == pytest.approx(runs[0]["losses"], rel=5e-3)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_tied_copies_stay_equal(gloo: GlooWorkers, precision: str) -> None:
    results = run(gloo, Case(pp=2, precision=precision, tied=True))
    first, last = (result["weights"]["embed.weight"] for result in results)
    assert torch.equal(first, last)


def test_dropout_draws_the_same_masks_under_every_layout(gloo: GlooWorkers) -> None:
    cases = [
        Case(pp=1, zero=0, dropout=0.2),
        Case(pp=2, zero=1, dropout=0.2),
        Case(pp=2, dp=2, zero=1, dropout=0.2),
        Case(pp=4, zero=1, dropout=0.2, checkpointing=True),
    ]
    losses = [run(gloo, case)[0]["losses"] for case in cases]
    assert losses[0] != pytest.approx(reference(Case())["losses"], rel=1e-3)
    for other in losses[1:]:
        assert other == pytest.approx(losses[0], rel=1e-4)


def test_evaluation_is_the_same_under_every_layout(gloo: GlooWorkers) -> None:
    evaluations = [
        result["evaluation"]
        for case in (Case(pp=1, steps=2), Case(pp=2, dp=2, steps=2), Case(pp=4, steps=2, dropout=0.0))
        for result in run(gloo, case)
    ]
    assert evaluations == pytest.approx([evaluations[0]] * len(evaluations), rel=1e-5)
