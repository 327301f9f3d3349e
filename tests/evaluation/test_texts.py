"""Texts to evaluate on, and the tokens that a model sees of them at once."""

from __future__ import annotations

from pathlib import Path

from pipekit.config import parse_config
from pipekit.evaluation.texts import EvaluatedSource


def test_a_model_sees_as_much_at_once_as_in_training_and_never_more_than_it_can() -> None:
    config = parse_config({"model": {"preset": "tiny"}, "train": {"steps": 1, "sequence_length": 8}})
    trained = EvaluatedSource(Path("run"), Path("tokenizer.json"), config)
    assert [trained.window(longest) for longest in (6, 100)] == [6, 8]
    export = EvaluatedSource(Path("export"), Path("tokenizer.json"))
    assert [export.window(longest) for longest in (24, 100_000)] == [24, 2048]
