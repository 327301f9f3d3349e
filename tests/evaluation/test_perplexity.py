"""Perplexity equals that of a loop in plain transformers, in windows of any stride."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

from pipekit.data.tokenizer import TextTokenizer, load_tokenizer
from pipekit.errors import DataError
from pipekit.evaluation.models import GeneratorModel
from pipekit.evaluation.perplexity import Perplexity, count_bytes, measure_perplexity, plan_windows
from pipekit.inference.generator import Generator

DOCUMENTS = ["def f(x):\n    return x\n", "naïve €\n", "", "function argument " * 9]


@given(st.integers(2, 60), st.integers(1, 12), st.integers(1, 12))
def test_every_token_but_the_first_is_scored_once_with_as_much_context_as_fits(
    num_tokens: int, window: int, stride: int
) -> None:
    stride = min(stride, window)
    scored: list[int] = []
    for begin, end, num_scored in plan_windows(num_tokens, window=window, stride=stride):
        scored += range(end - num_scored, end)
        assert end - begin == min(end, window + 1)
        assert num_scored <= (stride if begin else window)
    assert scored == list(range(1, num_tokens))


@pytest.fixture(scope="module")
def tokenizer(export: Path) -> TextTokenizer:
    return load_tokenizer(export)


@pytest.fixture(scope="module")
def tokens(tokenizer: TextTokenizer) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    ids = [token for text in DOCUMENTS for token in (*tokenizer.encode(text), tokenizer.end_token_id)]
    return np.array(ids, dtype=np.int64)


@pytest.mark.parametrize(("window", "stride"), [(24, 24), (24, 5), (8, 8), (7, 1)])
def test_the_loss_is_that_of_a_loop_in_transformers(
    run: Path, export: Path, tokens: np.ndarray, tokenizer: TextTokenizer, window: int, stride: int
) -> None:
    theirs = AutoModelForCausalLM.from_pretrained(export).eval()
    ids = torch.tensor(tokens)
    total, done = 0.0, 1
    with torch.no_grad():
        while done < len(ids):
            end = min(done + (window if done == 1 else stride), len(ids))
            inputs = ids[max(0, end - window - 1) : end]
            logits = theirs(inputs[None, :-1]).logits[0]
            labels = inputs[1:].clone()
            labels[: len(labels) - (end - done)] = -100
            total += float(torch.nn.functional.cross_entropy(logits, labels, reduction="sum"))
            done = end
    for source in (run, export):
        model = GeneratorModel(Generator.open(source, device="cpu"))
        ours = measure_perplexity(
            tokens, model.score, name="text", tokenizer=tokenizer, window=window, stride=stride, batch_size=3
        )
        assert ours.loss == pytest.approx(total / (len(ids) - 1), abs=1e-5)
        assert ours.num_tokens == len(ids) - 1


def test_bits_per_byte_counts_the_bytes_of_the_text(export: Path, tokens: np.ndarray, tokenizer: TextTokenizer) -> None:
    assert AutoTokenizer.from_pretrained(export).decode(tokens[:1]) == "def"
    num_bytes = len("".join(DOCUMENTS).encode()) - len("def")
    assert count_bytes(tokens, tokenizer) == num_bytes
    found = Perplexity("text", loss=2.0, num_tokens=len(tokens) - 1, num_bytes=num_bytes)
    assert found.bits_per_byte == pytest.approx(2.0 * (len(tokens) - 1) / math.log(2) / num_bytes)


def test_pieces_of_a_long_document_are_cut_between_characters(
    tokenizer: TextTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "a€\U0001d11e é" * 20
    tokens = np.array([tokenizer.end_token_id, *tokenizer.encode(text)])
    for pieces in (1, 2, 3, 7):
        monkeypatch.setattr("pipekit.evaluation.perplexity._DECODED_TOKENS", pieces)
        assert count_bytes(tokens, tokenizer) == len(text.encode())


def test_a_text_of_one_token_has_no_perplexity(tokenizer: TextTokenizer) -> None:
    with pytest.raises(DataError, match=r"mine\.txt: holds 1 tokens, and two at least are needed"):
        measure_perplexity(
            np.array([0]), lambda *_: pytest.fail("asked"), name="mine.txt", tokenizer=tokenizer, window=4, batch_size=1
        )


def test_what_is_beyond_numbers_is_null_in_json() -> None:
    record = Perplexity("text", loss=1000.0, num_tokens=3, num_bytes=0).as_record()
    assert record["perplexity"] is record["bits_per_byte"] is None
    assert record["loss"] == 1000.0
