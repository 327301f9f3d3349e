"""Time and memory of a run, against published runs and what can be worked out by hand."""

from __future__ import annotations

import pytest

from pipekit.errors import LayoutError
from pipekit.predictions.devices import find_device
from pipekit.predictions.prediction import predict as predict_boundaries
from predictions.planned import device, gpt, layer, model, plan, predict

# Narayanan et al. 2021, "Efficient Large-Scale Language Model Training on GPU Clusters Using Megatron-LM", table 1.
SIZES = [(36, 4096, 32, 7.5e9), (48, 8192, 64, 39.1e9), (96, 16384, 128, 310.1e9)]


@pytest.mark.parametrize(("num_layers", "hidden_size", "num_heads", "parameters"), SIZES)
def test_parameters_of_published_models(num_layers: int, hidden_size: int, num_heads: int, parameters: float) -> None:
    assert gpt(num_layers, hidden_size, num_heads).num_parameters == pytest.approx(parameters, rel=0.01)


def test_operations_are_those_of_the_published_formula() -> None:
    num_layers, width, length, vocabulary = 96, 12288, 2048, 51200
    layers = gpt(num_layers, width, 96).costs_of(1).layers
    with_recomputation = sum(costs.flops + costs.forward_flops for costs in layers)
    formula = 96 * length * num_layers * width**2
    formula *= 1 + length / (6 * width) + vocabulary / (16 * num_layers * width)
    assert with_recomputation == pytest.approx(formula, rel=0.01)


def test_one_device_computes_one_thing_after_the_other() -> None:
    found = predict(model([layer(100), layer(300)], loss=layer(50)), plan(num_micro_batches=4), device())
    assert found.times.compute_s == 4 * 3 * 4.5
    assert found.times.bubble_fraction == 0
    assert found.tokens_per_s == 4 * 8 / found.step_time_s
    assert found.tflops_per_device == pytest.approx(4 * 3 * 450 / found.step_time_s / 1e12)
    assert found.num_parameters == 20
    assert found.ranks[0].stages == (range(2),)


def test_recomputed_operations_count() -> None:
    plain, again = (
        predict(model([layer()] * 2), plan(num_micro_batches=4, checkpointing=checkpointing), device())
        for checkpointing in (False, True)
    )
    assert again.times.compute_s == pytest.approx(plain.times.compute_s * 4 / 3)
    assert again.tflops_per_device == pytest.approx(plain.tflops_per_device, rel=1e-3)
    assert again.memory_bytes < plain.memory_bytes


def test_a_pipeline_of_equal_stages_has_the_bubble_of_the_formula() -> None:
    found = predict(model([layer(passed_bytes=0)] * 4), plan(pp=4, num_micro_batches=8, schedule="1f1b"), device())
    assert found.boundaries == (0, 1, 2, 3, 4)
    assert found.times.bubble_fraction == pytest.approx(3 / 11)
    assert [rank.time_s for rank in found.ranks] == [24.0] * 4
    assert found.ranks[0].memory.activations > found.ranks[3].memory.activations


def test_given_boundaries_are_taken() -> None:
    found = predict_boundaries(model([layer()] * 4), plan(pp=2, num_micro_batches=2), device(), [0, 3, 4])
    assert [rank.stages for rank in found.ranks] == [(range(3),), (range(3, 4),)]
    assert [rank.parameters for rank in found.ranks] == [30, 10]


def test_balanced_stages_leave_room_for_the_loss() -> None:
    planned = model([layer()] * 8, loss=layer(200))
    assert predict(planned, plan(pp=2), device()).boundaries == (0, 5, 8)


def test_two_stages_of_a_rank_hold_a_tied_parameter_once() -> None:
    tied = gpt(4, 256, 4, "fp32")
    found = predict(tied, plan(pp=2, schedule="zb-v", stages_per_rank=2, num_micro_batches=2), find_device("h100"))
    assert sum(rank.parameters for rank in found.ranks) == tied.num_parameters


def test_long_tables_are_planned_for_fewer_micro_batches() -> None:
    table, shorter = plan(pp=8, num_micro_batches=1001).plan_schedules()
    assert shorter is not None
    assert (table.num_micro_batches, shorter.num_micro_batches) == (25, 17)
    short, none = plan(pp=8, num_micro_batches=32).plan_schedules()
    assert (short.num_micro_batches, none) == (32, None)


def test_under_gpipe_every_micro_batch_is_held() -> None:
    planned = model([layer()] * 8)
    few, many = (
        predict(planned, plan(pp=8, num_micro_batches=number, schedule="gpipe"), device()) for number in (200, 400)
    )
    assert many.ranks[0].memory.activations == 2 * few.ranks[0].memory.activations


def test_more_stages_than_layers_are_refused() -> None:
    with pytest.raises(LayoutError, match=r"parallel\.pp=3"):
        predict(model([layer()] * 2), plan(pp=3, num_micro_batches=3), device())


def test_a_layout_reads_as_one_line() -> None:
    shown = str(plan(pp=2, schedule="zb-v", stages_per_rank=2, num_micro_batches=4, checkpointing=True))
    assert shown == "pp=2 x dp=1 x tp=1, ZeRO 0, zb-v x 2, 4 micro-batches of 1, checkpointing"
