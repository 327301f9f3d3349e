"""Perplexity equals that of a loop in plain transformers, in windows of any stride."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

from pipekit.data.tokenizer import TextTokenizer, load_tokenizer
from pipekit.errors import DataError
from pipekit.evaluation.models import GeneratorModel
from pipekit.evaluation.perplexity import Perplexity, count_bytes, measure_perplexity, plan_windows
from pipekit.evaluation.texts import Text
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
            total += float(F.cross_entropy(logits, labels, reduction="sum"))
            done = end
    for source in (run, export):
        model = GeneratorModel(Generator.open(source, device="cpu"))
        ours = measure_perplexity(
            Text("text", tokens), model.score, tokenizer=tokenizer, window=window, stride=stride, batch_size=3
        )
        assert ours.loss == pytest.approx(total / (len(ids) - 1), abs=1e-5)
        assert ours.num_tokens == len(ids) - 1


def test_of_conversations_the_tokens_that_count_are_scored_each_by_itself(
    run: Path, export: Path, tokenizer: TextTokenizer
) -> None:
    # The last one is longer than a window, and goes on in the next.
    turns = [[("def", "function(x)"), (" return", " x")], [("a", "naïve €\n")], [("argument " * 30, "function " * 30)]]
    ids: list[list[int]] = []
    masks: list[list[int]] = []
    for turn in turns:
        parts = [(tokenizer.encode(text), learned) for pair in turn for text, learned in zip(pair, (0, 1), strict=True)]
        ids.append([token for tokens, _ in parts for token in tokens])
        masks.append([learned for tokens, learned in parts for _ in tokens])
    assert len(ids[-1]) > 24
    theirs = AutoModelForCausalLM.from_pretrained(export).eval()
    losses = []
    with torch.no_grad():
        for tokens, mask in zip(ids, masks, strict=True):
            for done in range(1, len(tokens), 24):
                end = min(done + 24, len(tokens))
                window = torch.tensor(tokens[max(0, end - 25) : end])
                each = F.cross_entropy(theirs(window[None, :-1]).logits[0], window[1:], reduction="none")
                losses += each[done - end :][torch.tensor(mask[done:end]).bool()].tolist()
    bounds = np.cumsum([0, *map(len, ids)])
    text = Text("chat", np.concatenate(ids), bounds, np.concatenate(masks).astype(np.uint8))
    model = GeneratorModel(Generator.open(run, device="cpu"))
    found = measure_perplexity(text, model.score, tokenizer=tokenizer, window=24, batch_size=3)
    assert found.loss == pytest.approx(np.mean(losses), abs=1e-5)
    assert found.num_tokens == len(losses) == sum(map(sum, masks))
    assert found.num_bytes == sum(len(answer.encode()) for turn in turns for _, answer in turn)
    text = Text("prompts", text.tokens, bounds, np.zeros_like(text.loss_mask))
    with pytest.raises(DataError, match=r"prompts: holds \d+ tokens, of which none counts in the loss; give"):
        measure_perplexity(text, model.score, tokenizer=tokenizer, window=24, batch_size=3)


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
            Text("mine.txt", np.array([0])),
            lambda *_: pytest.fail("asked"),
            tokenizer=tokenizer,
            window=4,
            batch_size=1,
        )


def test_what_is_beyond_numbers_is_null_in_json() -> None:
    record = Perplexity("text", loss=1000.0, num_tokens=3, num_bytes=0).as_record()
    assert record["perplexity"] is record["bits_per_byte"] is None
    assert record["loss"] == 1000.0
