"""Times of steps, against published runs: the table reads as published against predicted."""

from __future__ import annotations

from typing import NamedTuple

import pytest

from pipekit.commands.plan import PlanOptions, plan_report
from pipekit.config import parse_config
from pipekit.predictions.devices import find_device
from pipekit.predictions.prediction import PlannedModel, Prediction
from pipekit.predictions.timing import with_waiting
from pipekit.schedules import Costs, plan_schedule, simulate
from predictions.planned import plan, predict
from predictions.published import in_blocks, llama_405b, megatron, predict_run, published_step_s


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
    Run(1.7, 24, 2304, 24, 1, 1, 1, 16, 32, 512, 137, -0.062),
    Run(3.6, 30, 3072, 32, 2, 1, 1, 16, 64, 512, 138, -0.064),
    Run(7.5, 36, 4096, 32, 4, 1, 1, 16, 128, 512, 142, -0.052),
    Run(18.4, 40, 6144, 48, 8, 1, 1, 8, 256, 1024, 135, -0.053),
    Run(39.1, 48, 8192, 64, 8, 2, 1, 4, 512, 1536, 138, -0.031),
    Run(76.1, 60, 10240, 80, 8, 4, 3, 2, 1024, 1792, 140, -0.086),
    Run(145.6, 80, 12288, 96, 8, 8, 2, 2, 1536, 2304, 148, -0.031),
    Run(310.1, 96, 16384, 128, 8, 16, 2, 1, 1920, 2160, 155, -0.010),
    Run(529.6, 105, 20480, 128, 8, 35, 3, 1, 2520, 2520, 163, 0.025),
    Run(1008.0, 128, 25600, 160, 8, 64, 1, 1, 3072, 3072, 163, 0.069),
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
    Recomputation(48, 6144, 64, 1, 1, 4, 4, 1.42, 1.10, (-0.032, -0.038)),
    Recomputation(96, 12288, 96, 8, 3, 1, 64, 18.13, 13.75, (0.038, 0.050)),
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
            hides_sums=True,
        ).step_time_s
        for is_selective in (False, True)
    ]
    errors = [found / published - 1 for found, published in zip(seconds, (run.full_s, run.selective_s), strict=True)]
    assert max(map(abs, errors)) < 0.10
    assert errors == pytest.approx(run.errors, abs=0.005)


class Bloom(NamedTuple):
    """A run of BigScience on 384 A100s, with DeepSpeed's pipeline and its bf16 optimizer of February 2022."""

    layers: int
    width: int
    heads: int
    dp: int
    tp: int
    pp: int
    micro_batch: int
    gigabytes: int
    seconds: float
    errors: tuple[float, float]
    """Predicted over published memory and seconds of a step, less 1."""


# `train/tr11-176B-ml/chronicles-prequel.md` of bigscience-workshop/bigscience, "Rebalancing layers": the memory that
# `nvidia-smi` shows. Of rows that differ in the number of heads alone, one.
BLOOM = [
    Bloom(70, 14336, 112, 8, 4, 12, 2, 59, 104.50, (-0.030, -0.078)),
    Bloom(70, 14336, 64, 8, 4, 12, 4, 73, 102.27, (-0.068, -0.032)),
    Bloom(82, 13312, 64, 8, 4, 12, 2, 63, 104.45, (-0.087, -0.071)),
    Bloom(82, 13312, 64, 8, 4, 12, 4, 74, 104.82, (-0.062, -0.033)),
    Bloom(82, 13312, 64, 4, 8, 12, 4, 52, 111.79, (-0.011, -0.086)),
    Bloom(106, 12288, 96, 8, 4, 12, 2, 65, 118.79, (-0.034, -0.087)),
    Bloom(106, 12288, 96, 8, 4, 12, 4, 79, 120.34, (-0.031, -0.057)),
]


@pytest.mark.parametrize("run", BLOOM)
def test_a_published_run_under_deepspeed_takes_the_memory_and_the_time_predicted(run: Bloom) -> None:
    model = megatron(run.layers, run.width, run.heads, vocab_size=250_880, precision="bf16")
    # Four links of 100 Gbit/s for the eight GPUs of a node.
    a100 = find_device("a100-80gb")
    on = a100.model_copy(update={"inter_node": a100.inter_node.model_copy(update={"bandwidth": 6.25e9})})

    def predicted(model: PlannedModel, layers_per_block: int) -> Prediction:
        # The embedding and the head, which is tied to it, count as a block each.
        blocks = (run.layers + 2) // run.pp
        starts = [2 + layers_per_block * (blocks * stage - 1) for stage in range(1, run.pp)]
        return predict_run(
            model,
            num_gpus=run.dp * run.tp * run.pp,
            batch_size=2048,
            micro_batch_size=run.micro_batch,
            tp=run.tp,
            pp=run.pp,
            boundaries=[0, *starts, len(model.layer_names)],
            checkpointing=True,
            on=on,
        )

    # That version kept the gradients in 16 bits besides, where 0.19 keeps one at a time.
    ranks = predicted(in_blocks(model, tp=run.tp), 1).ranks
    num_bytes = on.memory_bytes - on.usable_bytes + max(rank.memory.total + 2 * rank.parameters for rank in ranks)
    seconds = predicted(model, 2).step_time_s
    errors = num_bytes / (run.gigabytes * 1e9) - 1, seconds / run.seconds - 1
    assert max(map(abs, errors)) < 0.10
    assert errors == pytest.approx(run.errors, abs=0.005)


# Sequences of a micro-batch, checkpointing, and the seconds of a step of `benchmarks/gpu.py` on an H200.
ONE_GPU = [(1, False, 0.359, -0.014), (8, False, 2.260, 0.052), (8, True, 2.650, 0.092)]


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
    Profiled(8, 24, 6, 18.5, 18.1, 9.3, 0.6, (11.8, 13.1, 12.9), (-0.004, 0.003)),
    Profiled(16, 48, 1, 11.3, 11.3, 8.1, 0.4, (1.40, 1.54, 1.61), (0.010, -0.011)),
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
    assert found == pytest.approx(run.samples_per_s, rel=0.08)
    gains, published = ([each / values[0] for each in values[1:]] for values in (found, run.samples_per_s))
    errors = [gain / other - 1 for gain, other in zip(gains, published, strict=True)]
    assert max(map(abs, errors)) < 0.02
    assert errors == pytest.approx(run.errors, abs=0.002)
