"""Models and devices to plan with, of round numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache, partial
from typing import Any

import torch

from pipekit.costs.describe import describe_layers
from pipekit.layers.parameters import parameter_shapes
from pipekit.layers.specs import layer_names
from pipekit.layout import Layout
from pipekit.models.gpt2 import GPT2Config
from pipekit.models.transformer import language_model_loss
from pipekit.predictions.devices import Device
from pipekit.predictions.elements import Precision
from pipekit.predictions.estimate import Estimator
from pipekit.predictions.layer_costs import LayerCosts, ModelCosts
from pipekit.predictions.parallel_plan import ParallelPlan
from pipekit.predictions.prediction import PlannedModel, Prediction
from pipekit.predictions.prediction import predict as predict_boundaries
from pipekit.settings.activations import read_setting


def device(**changes: Any) -> Device:
    """Return a device of 100 operations and 100 bytes a second, whose messages take no time to begin with."""
    link = {"bandwidth": 100.0, "latency_s": 0.0}
    values = {
        "name": "plain",
        "memory_bytes": 10**6,
        "reserve_bytes": 0,
        "peak_flops": dict.fromkeys(("fp32", "tf32", "bf16", "fp16"), 100.0),
        "memory_bandwidth": 1e6,
        "intra_node": link,
        "devices_per_node": 8,
        "inter_node": link,
        "efficiency": 1.0,
        "launch_s": 0.0,
        "source": "made up",
        "efficiency_source": "made up",
    }
    return Device.model_validate({**values, **changes})


def layer(flops: int = 100, *, parameters: int = 10, passed_bytes: int = 8, saved_bytes: int = 16) -> LayerCosts:
    """Return a layer whose forward, input gradient and weight gradient have as many operations."""
    return LayerCosts(
        parameters,
        flops,
        flops,
        flops,
        input_bytes=passed_bytes,
        output_bytes=passed_bytes,
        saved_bytes=saved_bytes,
        keeps_input=True,
        keeps_output=False,
    )


def model(
    layers: Sequence[LayerCosts], *, loss: LayerCosts | None = None, precision: Precision = "fp32"
) -> PlannedModel:
    """Return a model of these layers, whose costs grow with the micro-batch, and of sequences of 8 tokens."""

    def scaled(costs: LayerCosts, size: int) -> LayerCosts:
        names = ("forward_flops", "input_gradient_flops", "weight_gradient_flops")
        names += ("input_bytes", "output_bytes", "saved_bytes")
        sizes: Mapping[str, Any] = {name: size * getattr(costs, name) for name in names}
        return replace(costs, **sizes)

    return PlannedModel(
        costs_of=lambda size: ModelCosts(
            [scaled(costs, size) for costs in layers], None if loss is None else scaled(loss, size)
        ),
        shapes_of=lambda tp: [
            {f"layers.{index}.weight": (-(-costs.parameters // tp), 1)} for index, costs in enumerate(layers)
        ],
        layer_names=[f"layers.{index}" for index in range(len(layers))],
        sequence_length=8,
        precision=precision,
    )


def predict(planned: PlannedModel, plan: ParallelPlan, on: Device) -> Prediction:
    """Predict a layout whose stages balance the ranks' operations."""
    return predict_boundaries(planned, plan, on, Estimator(planned).boundaries(plan))


def plan(**changes: Any) -> ParallelPlan:
    """Return a layout: one device under 1F1B, and a micro-batch of one sequence, unless told otherwise."""
    values: dict[str, Any] = {
        "zero": 0,
        "schedule": "1f1b",
        "stages_per_rank": 1,
        "micro_batch_size": 1,
        "num_micro_batches": 1,
        "checkpointing": None,
    }
    layout = Layout(pp=changes.pop("pp", 1), dp=changes.pop("dp", 1), tp=changes.pop("tp", 1))
    if isinstance(changes.get("checkpointing"), bool):
        changes["checkpointing"] = read_setting(changes["checkpointing"])
    return ParallelPlan(layout, **{**values, **changes})


@cache
def gpt(num_layers: int, hidden_size: int, num_heads: int, precision: Precision = "fp16") -> PlannedModel:
    """Return a GPT of the published runs: sequences of 2,048 tokens of 51,200."""
    config = GPT2Config(
        vocab_size=51200,
        hidden_size=hidden_size,
        num_layers=num_layers,
        num_heads=num_heads,
        max_positions=2048,
    )
    specs = config.layer_specs()
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]

    @cache
    def costs_of(size: int) -> ModelCosts:
        ids = torch.empty(size, 2048, dtype=torch.int64, device="meta")
        return describe_layers(specs, ids, dtype=dtype, loss_fn=language_model_loss, labels=ids)

    return PlannedModel(costs_of, cache(partial(parameter_shapes, specs)), layer_names(specs), 2048, precision)
