"""Model cards: facts of the training, and nothing about the machine."""

from __future__ import annotations

from typing import Any

from pipekit.checkpoint.manifest import Manifest, TrainingState
from pipekit.config import parse_config
from pipekit.inference.model_card import model_card


def card_of(step: int, source: Any = "text.txt") -> str:
    values = {"model": {"preset": "tiny", "vocab_size": 300}, "data": {"source": source}}
    config = parse_config(
        {**values, "train": {"steps": 7, "sequence_length": 16}, "run": {"dir": "/home/me/runs/mine"}}
    )
    metrics = {"loss": 1.25, "grad_norm": 3.0}
    training = TrainingState(step, consumed_samples=40 * step, seed=1, lr=0.1, optimizer={}, metrics=metrics)
    manifest = Manifest(training, {}, {}, written_by={"pipekit": "9.9"})
    return model_card(
        "out", config, manifest, hf_class="GPT2LMHeadModel", num_parameters=1234, has_text=True, proof="It is proved."
    )


def test_the_facts_are_those_of_the_training() -> None:
    card = card_of(step=7)
    for row in ("| Steps | 7 |", "| Samples | 280 of 16 tokens |", "| Tokens | 4,480 |", "| Loss | 1.2500 |"):
        assert row in card
    assert "A `GPT2LMHeadModel` of 1,234 parameters, trained with pipekit 9.9." in card
    assert "It is proved." in card


def test_sources_are_named_without_the_paths_of_the_machine() -> None:
    card = card_of(step=7, source=["/home/me/books/one.txt", "notes"])
    assert "| Data | `one.txt`, `notes` |" in card
    assert "/home/me" not in card


def test_a_model_that_has_not_been_trained_claims_no_training() -> None:
    card = card_of(step=0)
    assert "| Steps | 0: the weights are those that the run began with |" in card
    assert not any(title in card for title in ("| Tokens |", "| Optimizer |", "| Loss |"))
