"""A prediction as plain data."""

from __future__ import annotations

import json

import pytest

from pipekit.partitioners import ComparedPartition
from pipekit.predictions.parallel_plan import ParallelPlan
from pipekit.predictions.prediction import Prediction
from pipekit.predictions.report import plan_report, read_plan, report
from pipekit.predictions.search import SearchSpace, search_layouts
from predictions.planned import device, layer, model, plan, predict

NAMES = [f"layers.{index}" for index in range(8)]


@pytest.fixture(scope="module")
def prediction() -> Prediction:
    given = plan(pp=2, schedule="zb-v", stages_per_rank=2, num_micro_batches=4)
    return predict(model([layer()] * 8), given, device())


def test_what_is_promised_is_there_and_is_json(prediction: Prediction) -> None:
    found = json.loads(json.dumps(report(prediction, device(), NAMES)))
    assert found["parameters"] == 80
    assert found["layout"]["schedule"] == "zb-v"
    assert found["step_time_s"] == prediction.step_time_s
    assert found["step_time_s"] == pytest.approx(found["compute_s"] + found["reduction_s"] + found["update_s"])
    assert found["tokens_per_s"] == prediction.tokens_per_s
    assert found["tflops_per_device"] == prediction.tflops_per_device
    assert 0 <= found["bubble_fraction"] < 1
    assert [stage["layers"] for stage in found["stages"]] == [
        [[0, 1, "layers.0", "layers.1"], [6, 7, "layers.6", "layers.7"]],
        [[2, 3, "layers.2", "layers.3"], [4, 5, "layers.4", "layers.5"]],
    ]
    for rank, stage in enumerate(found["stages"]):
        memory = stage["memory_bytes"]
        assert stage["rank"] == rank
        assert stage["parameters"] == 40
        assert stage["time_s"] == prediction.ranks[rank].time_s
        assert memory["total"] == prediction.ranks[rank].memory.total
        assert set(memory) >= {"weights", "gradients", "optimizer_states", "masters", "activations"}
    assert "layouts" not in found
    assert "partitions" not in found


@pytest.mark.parametrize("given", [plan(), plan(pp=2, dp=3, tp=4, stages_per_rank=2, checkpointing=True, zero=1)])
def test_a_layout_is_read_back(given: ParallelPlan) -> None:
    assert read_plan(json.loads(json.dumps(plan_report(given)))) == given


def test_the_timeline_is_left_out_where_it_is_long(prediction: Prediction) -> None:
    found = report(prediction, device(), NAMES)
    assert found["timeline"][0][0] == {"action": "0F0", "start_s": 0.0, "end_s": 2.0}
    long = predict(model([layer()] * 8), plan(pp=8, num_micro_batches=500, schedule="gpipe"), device())
    assert "timeline" not in report(long, device(), NAMES)


def test_what_was_compared_stands_beside_it(prediction: Prediction) -> None:
    result = search_layouts(model([layer()] * 8), SearchSpace(4, 8), device(), num_ranked=3)
    partitions = [ComparedPartition("flops", [0, 2, 4, 6, 8], 1.0)]
    found = report(prediction, device(), NAMES, result, partitions)
    assert [other["step_time_s"] for other in found["layouts"]] == [other.step_time_s for other in result.ranked]
    assert len(found["rejected"]) == len(result.rejected)
    assert all(entry["reason"] for entry in found["rejected"])
    assert (found["num_fitting"], found["num_open"]) == (result.num_fitting, 0)
    assert found["partitions"] == [{"method": "flops", "boundaries": [0, 2, 4, 6, 8], "imbalance": 1.0}]
