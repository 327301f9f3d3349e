"""Published runs as predictions take them: Megatron-LM's models on A100s, with its attention and its fused kernels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache, partial
from itertools import starmap
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor

from pipekit.costs.describe import describe_layers
from pipekit.layers.attention_core import recompute_attention
from pipekit.layers.parameters import parameter_shapes
from pipekit.layers.specs import layer_names
from pipekit.models.gpt2 import GPT2Config
from pipekit.models.llama import LlamaConfig
from pipekit.models.transformer import language_model_loss
from pipekit.predictions import timing
from pipekit.predictions.devices import Device, find_device
from pipekit.predictions.elements import Precision
from pipekit.predictions.estimate import Estimator
from pipekit.predictions.layer_costs import LayerCosts, ModelCosts
from pipekit.predictions.prediction import PlannedModel, Prediction, predict
from pipekit.settings.activations import read_setting
from predictions.planned import plan

_LENGTH, _VOCABULARY = 2048, 51_200


@cache
def megatron(
    num_layers: int,
    hidden_size: int,
    num_heads: int,
    *,
    vocab_size: int = _VOCABULARY,
    precision: Precision = "fp16",
    recomputes_attention: bool = False,
) -> PlannedModel:
    """Return a GPT of Megatron-LM, whose attention was not yet fused.

    Its dropout behind a layer is fused with the addition to the residual, as its softmax is with the mask; so neither
    stands in the model.
    """
    config = GPT2Config(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        num_layers=num_layers,
        num_heads=num_heads,
        max_positions=_LENGTH,
    )
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}[precision]
    setting = read_setting({"only": "attention"}) if recomputes_attention else None
    specs = recompute_attention(config.layer_specs(), setting)

    @cache
    def costs_of(size: int) -> ModelCosts:
        ids = torch.empty(size, _LENGTH, dtype=torch.int64, device="meta")
        with patch.object(F, "scaled_dot_product_attention", _attend):
            costs = describe_layers(specs, ids, dtype=dtype, loss_fn=language_model_loss, labels=ids)
        return replace(costs, layers=list(map(_recomputed_whole, costs.layers)))

    return PlannedModel(costs_of, cache(partial(parameter_shapes, specs)), layer_names(specs), _LENGTH, precision)


def in_blocks(model: PlannedModel, *, tp: int) -> PlannedModel:
    """Return BLOOM, of whose layers only the memory counts: a norm and a dropout behind the embedding, and blocks.

    A block is recomputed as one. Ours has attention and feed-forward as layers of their own, behind the embedding and
    the positions. The input of the norm and the mask of the dropout are whole on all tensor-parallel ranks.
    """

    def join(layers: Sequence[Any], joined: Callable[[Any, Any], Any]) -> list[Any]:
        blocks = zip(layers[2:-2:2], layers[3:-2:2], strict=True)
        return [*layers[:2], *starmap(joined, blocks), *layers[-2:]]

    def join_costs(attention: LayerCosts, feed_forward: LayerCosts) -> LayerCosts:
        saved_bytes = attention.saved_bytes + attention.output_bytes + feed_forward.saved_bytes
        return replace(attention, parameters=0, saved_bytes=saved_bytes, output_bytes=feed_forward.output_bytes)

    @cache
    def costs_of(size: int) -> ModelCosts:
        costs = model.costs_of(size)
        embedding, positions, *blocks = join(costs.layers, cache(join_costs))
        kept = replace(positions, saved_bytes=tp * 3 * positions.output_bytes // 2)
        return replace(costs, layers=[embedding, kept, *blocks])

    return replace(
        model,
        costs_of=costs_of,
        shapes_of=cache(lambda tp: join(model.shapes_of(tp), lambda one, other: {**one, **other})),
        layer_names=join(model.layer_names, lambda one, other: one),
    )


@cache
def _recomputed_whole(layer: LayerCosts) -> LayerCosts:
    """Layer as Megatron-LM recomputes it, to its end."""
    assert layer.work is not None
    return replace(layer, work=replace(layer.work, recomputed=layer.work.forward))


def llama_405b() -> PlannedModel:
    """Return the largest model of Llama 3, with sequences of 8,192 tokens."""
    length = 8192
    config = LlamaConfig(
        vocab_size=128256,
        hidden_size=16384,
        num_layers=126,
        num_heads=128,
        num_kv_heads=8,
        ffn_size=53248,
        max_positions=length,
    )
    specs = config.layer_specs()

    @cache
    def costs_of(size: int) -> ModelCosts:
        ids = torch.empty(size, length, dtype=torch.int64, device="meta")
        return describe_layers(specs, ids, dtype=torch.bfloat16, loss_fn=language_model_loss, labels=ids)

    return PlannedModel(costs_of, cache(partial(parameter_shapes, specs)), layer_names(specs), length, "bf16")


def _attend(query: Tensor, key: Tensor, value: Tensor, **kwargs: Any) -> Tensor:
    """Attention in two products, with the scores `(B H, S, T)` in memory."""
    batch = query.shape[0]
    query, key, value = (each.flatten(0, 1) for each in (query, key, value))
    scores = F.dropout(torch.softmax(torch.bmm(query, key.transpose(1, 2)), -1), 0.1)
    return torch.bmm(scores, value).unflatten(0, (batch, -1))


def predict_run(
    model: PlannedModel,
    *,
    num_gpus: int,
    batch_size: int,
    micro_batch_size: int,
    boundaries: Sequence[int] | None = None,
    hides_sums: bool = False,
    on: Device | None = None,
    **options: Any,
) -> Prediction:
    """Predict a run on A100s: 1F1B, or interleaved where a rank has several stages.

    Until 2022 Megatron-LM computed nothing while tensor-parallel ranks summed gradients, which `hides_sums` tells.
    """
    options = {"tp": 1, "pp": 1, "stages_per_rank": 1, "sequence_parallel": False, **options}
    dp = num_gpus // options["tp"] // options["pp"]
    schedule = "1f1b" if options["stages_per_rank"] == 1 else "interleaved-1f1b"
    given = plan(
        dp=dp,
        num_micro_batches=batch_size // dp // micro_batch_size,
        micro_batch_size=micro_batch_size,
        schedule=schedule,
        zero=1,
        **options,
    )
    with patch.object(timing, "_BESIDE", timing._BESIDE if hides_sums else 0.0):
        return predict(model, given, on or find_device("a100-80gb"), boundaries or Estimator(model).boundaries(given))


def published_step_s(
    num_layers: int, hidden_size: int, *, num_gpus: int, batch_size: int, tflops_per_gpu: float
) -> float:
    """Seconds of a step from operations a second by the formula that they were computed with.

    Source: Narayanan et al. 2021, "Efficient Large-Scale Language Model Training on GPU Clusters", section 5.1.
    """
    formula = 96 * batch_size * _LENGTH * num_layers * hidden_size**2
    formula *= 1 + _LENGTH / (6 * hidden_size) + _VOCABULARY / (16 * num_layers * hidden_size)
    return formula / num_gpus / tflops_per_gpu / 1e12
