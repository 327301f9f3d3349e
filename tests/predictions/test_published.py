"""Times of steps, against published runs: the table reads as published against predicted."""

from __future__ import annotations

from typing import NamedTuple

import pytest

from pipekit.commands.plan import PlanOptions, plan_report
from pipekit.config import parse_config
from pipekit.predictions.devices import find_device
from pipekit.predictions.timing import with_waiting
from pipekit.schedules import Costs, plan_schedule, simulate
from predictions.planned import plan, predict
from predictions.published import llama_405b, megatron, predict_run, published_step_s


class Run(NamedTuple):
    """A run of Narayanan et al. 2021, with the micro-batches and stages of `examples/sc21` in Megatron-LM."""

    billions: float
    layers: int
    width: int
    heads: int
    tp: int
    pp: int
    stages_per_rank: int
    micro_batch: int
    gpus: int
    batch: int
    tflops: float
    error: float
    """Predicted over published seconds of a step, less 1."""


# Table 1, on which the share of a device's speed that lasts is fitted, and no other number.
NARAYANAN = [
    Run(1.7, 24, 2304, 24, 1, 1, 1, 16, 32, 512, 137, -0.073),
    Run(3.6, 30, 3072, 32, 2, 1, 1, 16, 64, 512, 138, -0.060),
    Run(7.5, 36, 4096, 32, 4, 1, 1, 16, 128, 512, 142, -0.033),
    Run(18.4, 40, 6144, 48, 8, 1, 1, 8, 256, 1024, 135, -0.022),
    Run(39.1, 48, 8192, 64, 8, 2, 1, 4, 512, 1536, 138, -0.011),
    Run(76.1, 60, 10240, 80, 8, 4, 3, 2, 1024, 1792, 140, -0.069),
    Run(145.6, 80, 12288, 96, 8, 8, 2, 2, 1536, 2304, 148, -0.012),
    Run(310.1, 96, 16384, 128, 8, 16, 2, 1, 1920, 2160, 155, -0.008),
    Run(529.6, 105, 20480, 128, 8, 35, 3, 1, 2520, 2520, 163, 0.032),
    Run(1008.0, 128, 25600, 160, 8, 64, 1, 1, 3072, 3072, 163, 0.070),
]


def error_of(run: Run) -> float:
    """Predicted over published seconds of a step, less 1."""
    found = predict_run(
        megatron(run.layers, run.width, run.heads),
        num_gpus=run.gpus,
        batch_size=run.batch,
        micro_batch_size=run.micro_batch,
        tp=run.tp,
        pp=run.pp,
        stages_per_rank=run.stages_per_rank,
        checkpointing=True,
    )
    # They are published with one decimal.
    assert found.num_parameters == pytest.approx(run.billions * 1e9, rel=0.01, abs=0.05e9)
    assert found.memory_bytes < 80e9
    published_s = published_step_s(
        run.layers, run.width, num_gpus=run.gpus, batch_size=run.batch, tflops_per_gpu=run.tflops
    )
    return found.step_time_s / published_s - 1


# The tables of the largest take seconds.
RUNS = [pytest.param(run, marks=[pytest.mark.slow] * (run.pp > 16), id=f"{run.billions}B") for run in NARAYANAN]


@pytest.mark.parametrize("run", RUNS)
def test_steps_of_published_runs_take_as_long_as_predicted(run: Run) -> None:
    found = error_of(run)
    assert abs(found) < 0.10
    assert found == pytest.approx(run.error, abs=0.005)


# Table 2, the rows of PTD-P with 174.6 billion parameters: GPUs, and operations a second of each in 10^12.
SCALING = [(384, 153), (768, 149), (1536, 141)]


def test_a_published_run_slows_down_on_more_devices_as_predicted() -> None:
    errors = [
        error_of(Run(174.6, 96, 12288, 96, 8, 12, 1, 1, num_gpus, 1536, tflops, 0)) for num_gpus, tflops in SCALING
    ]
    assert all(abs(error) < 0.10 for error in errors)
    assert [(1 + errors[0]) / (1 + error) for error in errors] == pytest.approx([1, 1, 1], abs=0.01)


class Recomputation(NamedTuple):
    """Published seconds of a step with full recomputation, and with that of attention and sequence parallelism."""

    layers: int
    width: int
    heads: int
    pp: int
    stages_per_rank: int
    micro_batch: int
    batch: int
    full_s: float
    selective_s: float
    errors: tuple[float, float]


# Korthikanti et al. 2022, "Reducing Activation Recomputation in Large Transformer Models", table 5; tp=8.
KORTHIKANTI = [
    Recomputation(48, 6144, 64, 1, 1, 4, 4, 1.42, 1.10, (0.028, -0.064)),
    Recomputation(96, 12288, 96, 8, 3, 1, 64, 18.13, 13.75, (0.078, 0.048)),
]


@pytest.mark.parametrize("run", KORTHIKANTI, ids=["22B", "175B"])
def test_recomputation_takes_what_it_took_in_published_runs(run: Recomputation) -> None:
    seconds = [
        predict_run(
            megatron(run.layers, run.width, run.heads, recomputes_attention=is_selective),
            num_gpus=8 * run.pp,
            batch_size=run.batch,
            micro_batch_size=run.micro_batch,
            tp=8,
            pp=run.pp,
            stages_per_rank=run.stages_per_rank,
            checkpointing=not is_selective,
            sequence_parallel=is_selective,
        ).step_time_s
        for is_selective in (False, True)
    ]
    errors = [found / published - 1 for found, published in zip(seconds, (run.full_s, run.selective_s), strict=True)]
    assert max(map(abs, errors)) < 0.10
    assert errors == pytest.approx(run.errors, abs=0.005)


# Sequences of a micro-batch, checkpointing, and the seconds of a step of `benchmarks/gpu.py` on an H200.
ONE_GPU = [(1, False, 0.359, -0.045), (8, False, 2.260, 0.034), (8, True, 2.650, 0.074)]


@pytest.mark.parametrize(("micro_batch_size", "checkpointing", "measured_s", "error"), ONE_GPU)
def test_our_own_steps_on_one_gpu_take_as_long_as_predicted(
    micro_batch_size: int, checkpointing: bool, measured_s: float, error: float
) -> None:
    sizes = {"vocab_size": 50304, "hidden_size": 2048, "num_layers": 24, "num_heads": 16, "max_positions": 2048}
    batches = {"micro_batch_size": micro_batch_size, "global_batch_size": 8 * micro_batch_size}
    train = {"steps": 1, "sequence_length": 2048, "precision": "bf16", "activation_checkpointing": checkpointing}
    config = parse_config({"model": {"family": "gpt2", **sizes}, "train": {**train, **batches}})
    found = plan_report(config, PlanOptions(device="h200"))
    assert found["step_time_s"] / measured_s - 1 == pytest.approx(error, abs=0.01)


@pytest.mark.slow
@pytest.mark.parametrize(("num_gpus", "tflops"), [(8192, 430), (16384, 400)])
def test_a_run_that_nothing_was_fitted_on_takes_as_long_as_predicted(num_gpus: int, tflops: float) -> None:
    """Grattafiori et al. 2024, "The Llama 3 Herd of Models", table 4: 405 billion parameters on H100s.

    The stages of a rank are not told; four are taken.
    """
    planned, batch_size, length = llama_405b(), 2048, 8192
    dp = num_gpus // 128
    given = plan(
        pp=16, tp=8, dp=dp, num_micro_batches=batch_size // dp, schedule="interleaved-1f1b", stages_per_rank=4, zero=1
    )
    found = predict(planned, given, find_device("h100"))
    # As in PaLM: six operations for each parameter, and attention in full.
    per_token = 6 * planned.num_parameters + 12 * 126 * 16384 * length
    predicted = batch_size * length * per_token / num_gpus / found.step_time_s / 1e12
    assert predicted == pytest.approx(tflops, rel=0.10)


class Profiled(NamedTuple):
    """A profiled pipeline, and the samples of each GPU in a second under 1F1B, interleaved 1F1B and ZB-1p."""

    pp: int
    num_micro_batches: int
    micro_batch: int
    forward_ms: float
    input_gradient_ms: float
    weight_gradient_ms: float
    message_ms: float
    samples_per_s: tuple[float, float, float]
    errors: tuple[float, float]
    """Predicted over published gain of the other two over 1F1B, less 1."""


# Qi et al. 2024, "Zero Bubble Pipeline Parallelism", tables 4 and 5: models of 1.5 and 14.6 billion parameters, with
# three layers on each rank.
QI = [
    Profiled(8, 24, 6, 18.5, 18.1, 9.3, 0.6, (11.8, 13.1, 12.9), (-0.026, 0.002)),
    Profiled(16, 48, 1, 11.3, 11.3, 8.1, 0.4, (1.40, 1.54, 1.61), (-0.012, -0.012)),
]


@pytest.mark.parametrize("run", QI, ids=["1.5B", "14.6B"])
def test_schedules_are_as_much_faster_as_in_published_runs(run: Profiled) -> None:
    found = []
    for name, stages_per_rank in (("1f1b", 1), ("interleaved-1f1b", 3), ("zb-h1", 1)):
        table = plan_schedule(name, pp=run.pp, num_micro_batches=run.num_micro_batches, stages_per_rank=stages_per_rank)
        profiled = Costs.uniform(
            table.num_stages,
            forward_s=run.forward_ms / stages_per_rank / 1e3,
            input_gradient_s=run.input_gradient_ms / stages_per_rank / 1e3,
            weight_gradient_s=run.weight_gradient_ms / stages_per_rank / 1e3,
            transfer_s=run.message_ms / 1e3,
        )
        seconds = simulate(table, with_waiting(profiled, table.placement)).step_time_s
        found.append(run.num_micro_batches * run.micro_batch / run.pp / seconds)
    # What is not profiled, such as the update, is a few per cent of their steps.
    assert found == pytest.approx(run.samples_per_s, rel=0.06)
    gains, published = ([each / values[0] for each in values[1:]] for values in (found, run.samples_per_s))
    errors = [gain / other - 1 for gain, other in zip(gains, published, strict=True)]
    assert max(map(abs, errors)) < 0.03
    assert errors == pytest.approx(run.errors, abs=0.002)
