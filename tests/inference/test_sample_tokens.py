"""Sampling, from models whose probabilities are known."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from pipekit.errors import ConfigError, PipekitError
from pipekit.inference.sample_tokens import Sampling, sample_tokens

PROBABILITIES = [0.5, 0.3, 0.15, 0.05]


def fixed(tokens: Tensor) -> Tensor:
    """The same probabilities after every token."""
    return torch.tensor(PROBABILITIES).log().expand(*tokens.shape, 4)


def successor(tokens: Tensor) -> Tensor:
    """Each token is followed by the next number, modulo 10."""
    return torch.nn.functional.one_hot((tokens + 1) % 10, 10).float() * 5


def draw(model: Any = fixed, prompt: tuple[int, ...] = (0,), **options: Any) -> list[int]:
    return list(sample_tokens(model, prompt, **{"max_new_tokens": 2000, "max_positions": 4, **options}))


def shares(tokens: list[int]) -> list[float]:
    return [tokens.count(token) / len(tokens) for token in range(4)]


def close(tokens: list[int], probabilities: list[float]) -> bool:
    """True if each share is within five standard deviations."""
    margin = [5 * math.sqrt(p * (1 - p) / len(tokens)) for p in probabilities]
    return all(abs(s - p) <= m for s, p, m in zip(shares(tokens), probabilities, margin, strict=True))


def test_tokens_come_with_their_probabilities() -> None:
    assert close(draw(), PROBABILITIES)


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_the_temperature_divides_the_logits(temperature: float) -> None:
    powers = [p ** (1 / temperature) for p in PROBABILITIES]
    assert close(draw(temperature=temperature), [p / sum(powers) for p in powers])


def test_top_k_leaves_out_the_rest() -> None:
    assert close(draw(top_k=2), [0.5 / 0.8, 0.3 / 0.8, 0.0, 0.0])
    assert draw(top_k=1, max_new_tokens=5) == [0] * 5
    assert close(draw(top_k=100), PROBABILITIES)


@pytest.mark.parametrize(
    ("top_p", "kept"), [(1.0, PROBABILITIES), (0.81, [0.5, 0.3, 0.15]), (0.79, [0.5, 0.3]), (0.2, [0.5])]
)
def test_top_p_leaves_out_the_unlikely(top_p: float, kept: list[float]) -> None:
    expected = [p / sum(kept) for p in kept] + [0.0] * (4 - len(kept))
    assert close(draw(top_p=top_p), expected)


def test_top_p_is_reached_by_probabilities_that_add_up_to_it() -> None:
    def even(tokens: Tensor) -> Tensor:
        return torch.zeros(*tokens.shape, 4)  # 0.25 each, without an error of rounding

    assert set(draw(even, top_p=0.5, max_new_tokens=60)) == {0, 1}
    assert set(draw(even, top_p=0.51, max_new_tokens=60)) == {0, 1, 2}


def test_top_p_is_of_what_top_k_leaves() -> None:
    assert close(draw(top_k=3, top_p=0.6), [0.5 / 0.8, 0.3 / 0.8, 0.0, 0.0]), "0.5 / 0.95 is below 0.6"
    assert draw(top_k=2, top_p=0.6, max_new_tokens=5) == [0] * 5, "0.5 / 0.8 is not"


@pytest.mark.parametrize("settings", [{"top_k": 7}, {"top_p": 0.6}, {"top_k": 20, "top_p": 0.8, "temperature": 0.7}])
def test_what_can_be_drawn_is_what_transformers_leaves(settings: dict[str, Any]) -> None:
    logits = torch.randn(1, 40, generator=torch.Generator().manual_seed(2)) * 3
    names = {"temperature": "TemperatureLogitsWarper", "top_k": "TopKLogitsWarper", "top_p": "TopPLogitsWarper"}
    expected = logits
    for name in names:
        if name in settings:
            expected = getattr(transformers, names[name])(settings[name])(torch.zeros(1, 1), expected)
    seen = {Sampling(**settings).draw(logits[0], random.Random(seed)) for seed in range(3000)}
    left = expected.softmax(-1)[0]
    assert seen <= set(left.nonzero().flatten().tolist())
    assert seen >= set((left > 0.01).nonzero().flatten().tolist())


def test_temperature_zero_takes_the_likeliest() -> None:
    assert draw(successor, prompt=(7,), max_new_tokens=5, temperature=0) == [8, 9, 0, 1, 2]


@pytest.mark.parametrize("temperature", [1e-30, 1e-300])
def test_a_very_low_temperature_does_too(temperature: float) -> None:
    assert draw(successor, prompt=(7,), max_new_tokens=3, temperature=temperature) == [8, 9, 0]


def test_the_same_seed_draws_the_same_and_the_global_generator_is_left_alone() -> None:
    before = torch.get_rng_state()
    assert draw(seed=1) == draw(seed=1) != draw(seed=2)
    assert torch.equal(torch.get_rng_state(), before)


def test_it_stops_before_the_end_token() -> None:
    assert draw(successor, prompt=(7,), temperature=0, end_token_id=2) == [8, 9, 0, 1]


def test_the_model_sees_the_newest_tokens_that_fit() -> None:
    seen: list[list[int]] = []

    def watched(tokens: Tensor) -> Tensor:
        assert not torch.is_grad_enabled()
        seen.append(tokens[0].tolist())
        return successor(tokens)

    draw(watched, prompt=(1, 2, 3), max_new_tokens=5, temperature=0)
    assert seen == [[1, 2, 3], [1, 2, 3, 4], [3, 4, 5], [3, 4, 5, 6], [5, 6, 7]]


def test_of_a_prompt_that_is_too_long_it_sees_the_end() -> None:
    seen: list[list[int]] = []

    def watched(tokens: Tensor) -> Tensor:
        seen.append(tokens[0].tolist())
        return successor(tokens)

    draw(watched, prompt=tuple(range(9)), max_new_tokens=1, temperature=0)
    assert seen == [[6, 7, 8]]


def test_gradients_are_enabled_again_between_tokens() -> None:
    tokens = sample_tokens(fixed, [0], max_new_tokens=2, max_positions=4)
    next(tokens)
    assert torch.is_grad_enabled()


def test_no_token_is_drawn_where_none_is_asked_for() -> None:
    assert draw(max_new_tokens=0) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt": ()}, "the prompt is empty; give one token at least"),
        ({"max_new_tokens": -1}, "max_new_tokens=-1 must be at least 0"),
        ({"temperature": -0.5}, "temperature=-0.5 must be at least 0"),
        ({"temperature": float("nan")}, "temperature=nan must be at least 0"),
        ({"top_p": 0.0}, "top_p=0.0 must be above 0 and at most 1"),
        ({"top_p": 1.5}, "top_p=1.5 must be above 0 and at most 1"),
        ({"top_k": 0}, "top_k=0 must be at least 1; leave it out"),
    ],
)
def test_numbers_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        draw(**options)


def their_gpt2() -> Any:
    torch.manual_seed(3)
    sizes = {"vocab_size": 61, "n_embd": 24, "n_layer": 2, "n_head": 3, "n_positions": 16}
    settings = {"initializer_range": 0.5, "tie_word_embeddings": False, "bos_token_id": 0, "eos_token_id": None}
    config = transformers.GPT2Config(**sizes, **settings)
    return transformers.GPT2LMHeadModel(config).eval()


@pytest.mark.parametrize("prompt", [(5,), (1, 2, 3)])
def test_the_likeliest_tokens_are_those_that_transformers_takes(prompt: tuple[int, ...]) -> None:
    model, tokens = their_gpt2(), torch.tensor([prompt])
    mask = torch.ones_like(tokens)
    expected = model.generate(tokens, attention_mask=mask, max_new_tokens=12, do_sample=False, pad_token_id=0)
    ours = draw(lambda x: model(x).logits, prompt, max_new_tokens=12, max_positions=16, temperature=0)
    assert ours == expected[0, len(prompt) :].tolist()
    assert len(set(ours)) > 3, "a model that says one thing would hide a mix-up"


def test_beyond_its_positions_a_model_sees_a_window() -> None:
    model = their_gpt2()
    tokens = [7]
    with torch.no_grad():
        for _ in range(40):
            forgotten = 8 * max(0, -(-(len(tokens) - 16) // 8))  # the oldest half, each time that it is full
            tokens.append(int(model(torch.tensor([tokens[forgotten:]])).logits[0, -1].argmax()))
    drawn = draw(lambda x: model(x).logits, (7,), max_new_tokens=40, max_positions=16, temperature=0)
    assert drawn == tokens[1:]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("logit", [float("nan"), float("inf")])
def test_logits_that_are_no_numbers_are_told(temperature: float, logit: float) -> None:
    def diverged(tokens: Tensor) -> Tensor:
        return torch.tensor([0.0, logit, float("-inf")]).expand(*tokens.shape, 3)

    with pytest.raises(PipekitError, match="logits are nan or infinite: its training diverged"):
        draw(diverged, temperature=temperature)
