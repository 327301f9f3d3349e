"""Operations of a sequence against those that torch counts in the model of transformers."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import GPT2Config, GPT2LMHeadModel

from pipekit.config import parse_config
from pipekit.costs.describe import describe_layers
from pipekit.costs.sequence_flops import fit_sequence_flops, flops_of, model_flops
from pipekit.layers.specs import LayerSpec
from pipekit.plan.decide import decide_run
from pipekit.plan.resources import Resources
from pipekit.predictions.layer_costs import ModelCosts
from pipekit.training.language_model import LanguageModelTrial
from pipekit.training.layers_trial import LayersTrial
from pipekit.training.prepare import _sequence_flops

SIZES = {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "max_positions": 64, "vocab_size": 100}


def count(length: int, *, num_sequences: int = 2) -> float:
    """Operations of a sequence of a GPT-2 of transformers, whose attention is written out."""
    config = GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=64, vocab_size=100, attn_implementation="eager")
    ids = torch.zeros(num_sequences, length, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter:
        GPT2LMHeadModel(config)(ids, labels=ids).loss.backward()
    # Of the fused attention, the backward makes one of its two products again.
    again = 2 * 32 * length**2 * 2
    return counter.get_total_flops() / num_sequences + again


def planned(**sections: Any) -> tuple[float, float] | None:
    train = {"steps": 4, "global_batch_size": 4, "micro_batch_size": 2, "sequence_length": 64}
    config = parse_config({"model": SIZES, **sections, "train": {**train, **sections.get("train", {})}})
    return _sequence_flops(decide_run(config, LanguageModelTrial, Resources(world_size=1)), LanguageModelTrial)


def test_a_whole_sequence_takes_what_torch_counts() -> None:
    found = planned()
    assert found is not None
    assert flops_of(found, 64) == pytest.approx(count(64))
    # Recomputation is no operation of the model.
    assert planned(train={"activation_checkpointing": True}) == found


def test_under_a_curriculum_so_does_every_length() -> None:
    found = planned(train={"curriculum": {"min_difficulty": 8, "total_curriculum_step": 4}})
    assert found is not None
    for length in (8, 24, 64):
        assert flops_of(found, length) == pytest.approx(count(length))


def test_frozen_layers_before_the_first_trained_one_have_no_backward() -> None:
    sizes = (6, 5, 4, 3)
    specs = [LayerSpec(nn.Linear, a, b, bias=False) for a, b in pairwise(sizes)]
    costs = describe_layers(specs, torch.empty(7, 6, device="meta"), dtype=torch.float32)
    layers = [replace(costs.layers[0], parameters=0), *costs.layers[1:]]
    frozen, rest = 2 * 7 * 6 * 5, 6 * 7 * (5 * 4 + 4 * 3)
    assert model_flops(ModelCosts(layers)) == frozen + rest
    # Nobody asks for the gradient of the inputs.
    assert fit_sequence_flops(lambda length: costs, {7}, 1) == (4 * 6 * 5 + 6 * (5 * 4 + 4 * 3), 0.0)


def test_they_are_unknown_where_layers_are_left_out_or_nothing_describes_their_inputs() -> None:
    assert planned(train={"layer_drop": True}) is None

    class Mute(LanguageModelTrial):
        example = LayersTrial.example  # type: ignore[assignment]

    decision = decide_run(
        parse_config({"model": SIZES, "train": {"steps": 1, "sequence_length": 64}}), Mute, Resources(world_size=1)
    )
    assert _sequence_flops(decision, Mute) is None
