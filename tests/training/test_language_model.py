from __future__ import annotations

from pathlib import Path

import pytest

from pipekit.config import parse_config
from pipekit.data.prepare import PreparedData
from pipekit.training.language_model import LanguageModelTrial


@pytest.mark.parametrize(
    ("vocab_size", "num_tokens", "is_told"),
    [("auto", 300, False), (50304, 50257, False), (1300, 300, False), (1400, 300, True), (128256, 32000, True)],
)
def test_a_vocabulary_far_larger_than_the_tokenizers_is_told_of(
    caplog: pytest.LogCaptureFixture, vocab_size: int | str, num_tokens: int, is_told: bool
) -> None:
    config = parse_config({"model": {"preset": "tiny", "vocab_size": vocab_size}, "train": {"steps": 1}})
    prepared = PreparedData(
        tokenizer_path=Path("tokenizer.json"), vocab_size=num_tokens, sources=(), fingerprint="0"
    ).model_dump(mode="json")
    resolved = LanguageModelTrial.resolve(config, prepared)
    assert resolved.model.vocab_size == (num_tokens if vocab_size == "auto" else vocab_size)  # type: ignore[attr-defined]
    assert ("which are never trained" in caplog.text) == is_told
