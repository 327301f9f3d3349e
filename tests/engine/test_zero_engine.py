"""ZeRO-2 and 3 without a pipeline, against one process that uses nothing but torch."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import replace
from types import BuiltinFunctionType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine_jobs import (
    GLOBAL_BATCH,
    SEQUENCE,
    VOCAB,
    Case,
    assert_trained_as_one_process,
    batch,
    build_engine,
    compiling_adam,
    make_optimizer,
    micro_batches,
    reference,
    show,
    train_job,
)
from gloo_workers import GlooWorkers
from pipekit.errors import ConfigError, DataError, PipekitError
from pipekit.layers.sequential import SequentialModel
from pipekit.layers.specs import LayerSpec
from pipekit.models.transformer import language_model_loss

pytestmark = pytest.mark.distributed


def run(gloo: GlooWorkers, case: Case, **options: Any) -> list[dict[str, Any]]:
    return gloo.run(case.world_size, train_job, case, options)


def check_against_reference(gloo: GlooWorkers, case: Case) -> None:
    assert_trained_as_one_process(run(gloo, case), case)


@pytest.mark.parametrize(
    "case",
    [
        Case(zero=2),
        Case(zero=2, dp=2),
        pytest.param(Case(zero=2, dp=4, micro_batch_size=2), marks=pytest.mark.slow),
        Case(zero=2, dp=2, tied=False, clip=0.0),
        Case(zero=2, dp=2, checkpointing=True),
        Case(zero=3),
        Case(zero=3, dp=2),
        pytest.param(Case(zero=3, dp=4, micro_batch_size=2), marks=pytest.mark.slow),
        Case(zero=3, dp=2, tied=False, clip=0.0),
        Case(zero=3, dp=2, checkpointing=True),
        Case(zero=3, dp=2, optimizer="sgd"),
    ],
    ids=show,
)
def test_fp32_trains_as_one_process_does(gloo: GlooWorkers, case: Case) -> None:
    check_against_reference(gloo, case)


@pytest.mark.parametrize(
    "case",
    [
        Case(zero=1, pp=2, offload="optimizer"),
        Case(zero=3, dp=2, offload="parameters", checkpointing=True),
        pytest.param(Case(zero=2, dp=2, offload="optimizer", optimizer="sgd"), marks=pytest.mark.slow),
        Case(zero=1, pp=2, offload="nvme"),
        Case(zero=3, dp=2, offload="nvme"),
        pytest.param(Case(zero=2, dp=2, offload="nvme"), marks=pytest.mark.slow),
        pytest.param(Case(zero=2, dp=2, offload="nvme", optimizer="sgd"), marks=pytest.mark.slow),
    ],
    ids=show,
)
def test_masters_and_moments_in_host_memory_or_files_change_nothing(gloo: GlooWorkers, case: Case) -> None:
    check_against_reference(gloo, case)


@pytest.mark.slow
@pytest.mark.parametrize(
    "case",
    [
        Case(zero=1, pp=2, offload="optimizer"),
        Case(zero=1, pp=2, dp=2, offload="optimizer"),
        Case(zero=2, dp=2, offload="optimizer"),
        Case(zero=3, dp=2, offload="optimizer"),
        Case(zero=3, dp=2, offload="parameters", checkpointing=True),
    ],
    ids=show,
)
def test_deepspeeds_adam_makes_the_same_updates_in_host_memory(gloo: GlooWorkers, case: Case) -> None:
    assert_trained_as_one_process(gloo.run(case.world_size, compiling_adam, train_job, case, {}), case)


@pytest.mark.parametrize(
    ("precision", "others"),
    [
        ("bf16", [Case(zero=2, dp=2, offload="optimizer"), Case(zero=3, dp=2)]),
        *(
            pytest.param(
                precision,
                [
                    Case(zero=2, dp=2),
                    Case(zero=2, dp=2, offload="optimizer"),
                    Case(zero=3, dp=2),
                    Case(zero=3, dp=2, offload="parameters"),
                    Case(pp=2, dp=2, offload="optimizer"),
                ],
                marks=pytest.mark.slow,
            )
            for precision in ("bf16", "fp16")
        ),
    ],
)
def test_16_bit_training_stays_near_fp32(gloo: GlooWorkers, precision: str, others: list[Case]) -> None:
    expected = reference(Case())
    runs = [run(gloo, replace(case, precision=precision))[0] for case in (Case(), *others)]
    for result in runs:
        assert result["losses"] == pytest.approx(expected["losses"], rel=0.02)
        assert result["norms"] == pytest.approx(expected["norms"], rel=0.05)
        assert result["losses"] == pytest.approx(runs[0]["losses"], rel=5e-3)


def test_many_micro_batches_lose_nothing_in_bf16(gloo: GlooWorkers) -> None:
    # The second gradient is too small beside the first to survive a sum in bf16.
    for zero in (2, 3):
        for gradient in gloo.run(1, accumulate_small_gradients, zero):
            assert gradient == pytest.approx((1.0 + 7 * 2**-10) / GLOBAL_BATCH, rel=1e-5)


class Scale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight


def accumulate_small_gradients(rank: int, zero: int) -> float:
    case = Case(zero=zero, precision="bf16", clip=0.0, optimizer="sgd")
    engine = build_engine(case, [LayerSpec(Scale)], lambda outputs, labels: outputs.sum())
    sizes = [1.0, *[2**-10] * 7]
    engine.train_batch(iter([(torch.tensor([size], dtype=torch.bfloat16), torch.zeros(1)) for size in sizes]))
    return float(engine.grad_norm)


@pytest.mark.slow
def test_dropout_draws_the_same_masks_under_every_layout(gloo: GlooWorkers) -> None:
    cases = [
        Case(pp=2, zero=1, dropout=0.2),
        Case(zero=2, dp=2, dropout=0.2),
        Case(zero=3, dp=2, dropout=0.2),
        Case(zero=3, dp=4, dropout=0.2, checkpointing=True),
    ]
    losses = [run(gloo, case)[0]["losses"] for case in cases]
    assert losses[0] != pytest.approx(reference(Case())["losses"], rel=1e-3)
    for other in losses[1:]:
        assert other == pytest.approx(losses[0], rel=1e-4)


def test_evaluation_is_the_same_under_every_layout(gloo: GlooWorkers) -> None:
    cases = (Case(pp=2, steps=2), Case(zero=2, dp=2, steps=2), Case(zero=3, dp=2, steps=2))
    evaluations = [result["evaluation"] for case in cases for result in run(gloo, case)]
    assert evaluations == pytest.approx([evaluations[0]] * len(evaluations), rel=1e-5)


@pytest.mark.parametrize("zero", [2, 3])
def test_evaluation_gives_logits_and_is_observed(gloo: GlooWorkers, zero: int) -> None:
    results = gloo.run(2, evaluate_in_detail, zero)
    of_all = [each for _, losses, _, _ in results for each in losses]
    for loss, losses, observed, shape in results:
        assert len(losses) == observed == GLOBAL_BATCH // 2
        assert loss == pytest.approx(sum(of_all) / GLOBAL_BATCH, rel=1e-5)
        assert shape == (GLOBAL_BATCH // 2, SEQUENCE, VOCAB)


def evaluate_in_detail(rank: int, zero: int) -> tuple[float, list[float], int, tuple[int, ...]]:
    case = Case(zero=zero, dp=2)
    engine = build_engine(case)
    seen: list[Any] = []
    loss, logits = engine.eval_batch(
        micro_batches(0, case, rank), return_logits=True, observe=lambda outputs, labels: seen.append(outputs)
    )
    losses = engine.eval_batch(micro_batches(0, case, rank), reduce_output=None)
    return float(loss), [float(loss) for loss in losses], len(seen), tuple(logits.shape)


@pytest.mark.parametrize("zero", [2, 3])
def test_data_that_end_on_one_rank_stop_all_with_one_error(gloo: GlooWorkers, zero: int) -> None:
    messages = gloo.run(2, exhaust_one, zero)
    assert messages[0] == messages[1]
    assert "ended at micro-batch 3 of 4" in messages[0]


def exhaust_one(rank: int, zero: int) -> str:
    case = Case(zero=zero, dp=2)
    engine = build_engine(case)
    engine.train_batch(micro_batches(0, case, rank))
    data = list(micro_batches(1, case, rank))
    with pytest.raises(DataError) as caught:
        engine.train_batch(iter(data[:3] if rank == 1 else data))
    # The engine goes on, as if nothing had been read.
    assert engine.global_steps == 1
    engine.train_batch(micro_batches(1, case, rank))
    return str(caught.value)


@pytest.mark.parametrize(
    "case",
    [
        Case(zero=2, dp=2),
        Case(zero=3, dp=2),
        Case(zero=2, dp=2, offload="optimizer"),
        Case(zero=3, dp=2, precision="bf16"),
    ],
    ids=show,
)
def test_infinite_gradients_skip_the_step_on_every_rank(gloo: GlooWorkers, case: Case) -> None:
    for norms, skipped, steps, unchanged, finite in gloo.run(2, overflow, case):
        assert norms[1] == float("inf")
        assert norms[0] == pytest.approx(norms[2], rel=0.5)
        assert (skipped, steps) == (1, 3)
        assert unchanged
        assert finite


def overflow(rank: int, case: Case) -> tuple[list[float], int, int, bool, bool]:
    factor = [1.0]

    def loss_fn(outputs: Tensor, labels: Tensor) -> Tensor:
        return language_model_loss(outputs, labels) * factor[0]

    engine = build_engine(case, loss_fn=loss_fn)
    norms, weights = [], []
    for step, scale in enumerate((1.0, float("inf") if rank == 1 else 1.0, 1.0)):
        factor[0] = scale
        engine.train_batch(micro_batches(step, case, rank))
        norms.append(engine.grad_norm)
        masters = (engine.view.full_master(p).clone() for p in engine.module.parameters())
        weights.append(torch.cat([master.flatten() for master in masters]))
    unchanged = torch.equal(weights[0], weights[1])
    return norms, engine.skipped_steps, engine.global_steps, unchanged, bool(weights[2].isfinite().all())


class Sometimes(nn.Module):
    """Uses its second weight for batches that begin with an even number alone."""

    def __init__(self) -> None:
        super().__init__()
        self.always = nn.Linear(VOCAB, VOCAB)
        self.sometimes = nn.Linear(VOCAB, VOCAB)

    def forward(self, token_ids: Tensor) -> Tensor:
        x = F.one_hot(token_ids, VOCAB).float()
        return self.always(x) + (self.sometimes(x) if int(token_ids.flatten()[0]) % 2 == 0 else 0.0)


def step_data(step: int) -> Iterator[tuple[Tensor, Tensor]]:
    inputs, labels = batch(step)
    for row in range(GLOBAL_BATCH):
        chosen = inputs[row : row + 1].clone()
        chosen[0, 0] = step  # Even steps use the second weight, odd ones do not.
        if row in (0, GLOBAL_BATCH - 1):
            chosen[0, 0] = 1
        yield chosen, labels[row : row + 1]


@pytest.mark.parametrize(
    "case",
    [Case(zero=2), Case(zero=3), Case(zero=2, offload="optimizer"), Case(zero=3, offload="optimizer")],
    ids=show,
)
def test_what_a_step_leaves_unused_gets_no_gradient_of_an_earlier_step(gloo: GlooWorkers, case: Case) -> None:
    case = Case(**{**vars(case), "clip": 0.0, "optimizer": "sgd"})
    model = SequentialModel([LayerSpec(Sometimes)], seed=1)
    optimizer = make_optimizer(case, list(model.parameters()))
    norms = []
    for step in range(4):
        optimizer.zero_grad(set_to_none=False)
        for inputs, labels in step_data(step):
            (language_model_loss(model(inputs), labels) / GLOBAL_BATCH).backward()
        norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), float("inf"))))
        optimizer.step()
    assert gloo.run(1, train_sometimes, case)[0] == pytest.approx(norms, rel=1e-4)


def train_sometimes(rank: int, case: Case) -> list[float]:
    engine = build_engine(case, [LayerSpec(Sometimes)])
    norms = []
    for step in range(4):
        engine.train_batch(step_data(step))
        norms.append(engine.grad_norm)
    return norms


def test_a_timeline_of_a_step(gloo: GlooWorkers) -> None:
    for table, durations in gloo.run(2, time_a_step):
        assert table == "0F0 0B0 0F1 0B1 0F2 0B2 0F3 0B3"
        assert len(durations) == 8
        assert min(durations) > 0


def time_a_step(rank: int) -> tuple[str, list[float]]:
    case = Case(zero=3, dp=2)
    engine = build_engine(case, profile=True)
    engine.train_batch(micro_batches(0, case, rank))
    timeline = engine.gather_timeline()
    return str(timeline.schedule), [span.end_s - span.start_s for span in timeline.spans[0]]


def test_training_data_come_in_their_order_and_go_on(gloo: GlooWorkers) -> None:
    for zero in (2, 3):
        losses = gloo.run(2, train_on_dataset, zero)
        assert losses[0] == losses[1]
        assert losses[0] == pytest.approx(gloo.run(1, train_on_dataset, 1)[0], rel=1e-4)


def train_on_dataset(rank: int, zero: int) -> list[float]:
    case = Case(zero=zero, dp=2 if zero > 1 else 1)
    engine = build_engine(case)
    pairs = [pair for step in range(3) for pair in zip(*batch(step), strict=True)]
    engine.set_training_data(pairs)
    return [float(engine.train_batch()) for _ in range(4)]


def test_without_a_compiler_torch_makes_the_updates(gloo: GlooWorkers) -> None:
    results = gloo.run(2, train_without_compiler)
    expected = reference(Case())
    for _, _, losses in results:
        assert losses == pytest.approx(expected["losses"][:3], rel=1e-4)
    assert [kind for kind, _, _ in results] == ["AdamW", "AdamW"]
    (note,), others = results[0][1], results[1][1]
    assert "parallel.offload: DeepSpeed's Adam for CPUs cannot be compiled here (no compiler)" in note
    assert others == []


def train_without_compiler(rank: int) -> tuple[str, list[str], list[float]]:
    from pipekit.deepspeed import cpu_adam

    notes: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: notes.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger(cpu_adam.__name__).addHandler(handler)
    original = cpu_adam._reason_against_building
    # One machine of several is enough.
    cpu_adam._reason_against_building = lambda: "no compiler" if rank == 1 else None  # type: ignore[assignment]
    try:
        case = Case(zero=2, dp=2, offload="optimizer")
        engine = build_engine(case)
        losses = [float(engine.train_batch(micro_batches(step, case, rank))) for step in range(3)]
    finally:
        cpu_adam._reason_against_building = original
        logging.getLogger(cpu_adam.__name__).removeHandler(handler)
    return type(engine.view.torch_optimizer).__name__, notes, losses


@pytest.mark.slow
def test_deepspeeds_adam_makes_the_updates_where_it_can_be_built(gloo: GlooWorkers) -> None:
    assert (
        gloo.run(2, compiling_adam, name_optimizers) == [["DeepSpeedCPUAdam", "DeepSpeedCPUAdam", "SGD", "AdamW"]] * 2
    )


def name_optimizers(rank: int) -> list[str]:
    cases = [
        Case(zero=2, dp=2, offload="optimizer"),
        Case(zero=3, dp=2, offload="parameters"),
        Case(zero=2, dp=2, offload="optimizer", optimizer="sgd"),
        Case(zero=2, dp=2),
    ]
    return [type(build_engine(case).view.torch_optimizer).__name__ for case in cases]


def test_what_cannot_run_is_refused(gloo: GlooWorkers) -> None:
    messages = gloo.run(2, build_two_stages)
    assert "ZeRO-2 needs a model of one stage, and this one has 2; try ZeRO-1, or one stage" in messages[0]
    assert "call it outside torch.no_grad()" in gloo.run(1, train_without_gradients)[0]


def build_two_stages(rank: int) -> str:
    with pytest.raises(ConfigError) as caught:
        build_engine(Case(pp=2, zero=2))
    return str(caught.value)


def train_without_gradients(rank: int) -> str:
    engine = build_engine(Case(zero=3))
    with torch.no_grad(), pytest.raises(PipekitError) as caught:
        engine.train_batch(micro_batches(0, Case(), 0))
    return str(caught.value)


def test_gradients_are_summed_over_the_tensor_group_as_they_come(gloo: GlooWorkers) -> None:
    assert gloo.run(2, sum_gradients) == [[7.0, 3.0], [7.0, 4.0]]


def sum_gradients(rank: int) -> list[float]:
    from pipekit.distributed.mpu import ModelParallelUnit
    from pipekit.engine.partial_gradients import sum_gradients_over
    from pipekit.layout import Layout

    unit = ModelParallelUnit(Layout(tp=2))
    partial, other = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1))
    sum_gradients_over(unit.tensor, [partial])
    ((partial + other) * (3.0 + rank)).backward()
    assert partial.grad is not None
    assert other.grad is not None
    return [float(partial.grad), float(other.grad)]


def linear_after_zero_3(rank: int) -> bool:
    train_job(rank, Case(zero=3, steps=1), {})
    return isinstance(F.linear, BuiltinFunctionType)


def test_zero_3_leaves_torchs_functions_as_they_were(gloo: GlooWorkers) -> None:
    # Another function in the place of F.linear would keep schedules from putting weight gradients off.
    assert gloo.run(1, linear_after_zero_3) == [True]
