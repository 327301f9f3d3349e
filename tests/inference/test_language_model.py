"""The key-value cache of generation: tokens of every family, in batches, against those of `transformers`."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from decoder_kinds import KINDS
from pipekit.errors import ConfigError
from pipekit.inference.hugging_face import to_hf
from pipekit.inference.language_model import LanguageModel
from pipekit.inference.sample_tokens import Sampling, continue_prompts
from pipekit.layers.sequential import SequentialModel
from pipekit.layers.specs import LayerSpec
from pipekit.models import find_families
from pipekit.models.family import TransformerFamily
from pipekit.models.transformer import AttentionHalf
from pipekit.models.transformer.block import Attention
from tensor_parallel.outcomes import VOCAB, random_weights

OTHERS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("gpt2", {}),
    "gpt_neox": ("gpt_neox", {}),
    "gpt_neox, halves": ("gpt_neox", {"use_parallel_residual": False, "rotary_pct": 0.5}),
}
ALL = {**OTHERS, **KINDS}
QUICK = [
    "gpt2",
    "gpt_neox",
    "gpt_neox, halves",
    "llama, grouped, tied",
    "llama, llama3",
    "llama, yarn",
    "mistral, window",
    "qwen2, window",
    "gemma2",
    "gemma3",
    "olmo2",
    "phi3, longrope",
]
PROMPTS = [[3, 1, 4], [1, 5, 9, 2, 6, 5, 3], [5], [8, 9, 7, 9, 3]]
NEW = 16


def config_of(kind: str, **changes: Any) -> TransformerFamily:
    family, particular = ALL[kind]
    sizes = {"vocab_size": VOCAB, "hidden_size": 32, "num_layers": 2, "num_heads": 4, "ffn_size": 26}
    return find_families()[family].model_validate({**sizes, "max_positions": 24, **particular, **changes})


@cache
def layers_of(kind: str) -> SequentialModel:
    specs = config_of(kind).layer_specs()
    model = SequentialModel(specs, seed=None)
    model.load_logical_tensors(random_weights(specs), where=kind)
    return model.double().eval()


def model_of(kind: str) -> LanguageModel:
    return LanguageModel(layers_of(kind), longest_sequence=24, device="cpu")


def likeliest(model: LanguageModel, prompts: list[list[int]], *, max_new_tokens: int = NEW) -> list[list[int]]:
    """Continuation of each prompt, the likeliest token each time."""
    tokens: list[list[int]] = [[] for _ in prompts]
    for index, token in continue_prompts(
        model.next_logits,
        prompts,
        max_new_tokens=max_new_tokens,
        max_positions=model.longest_sequence,
        sampling=Sampling(temperature=0),
        seeds=[0] * len(prompts),
    ):
        tokens[index].append(token)
    return tokens


def theirs(kind: str, prompts: list[list[int]]) -> list[list[int]]:
    """Continuation of each prompt by the `generate` of transformers, one at a time."""
    config = config_of(kind)
    stored = transformers.AutoConfig.for_model(**config.hf_config(end_token_id=0, dtype="float32"))
    stored.pad_token_id = stored.eos_token_id = None
    weights = dict(to_hf(config, random_weights(config.layer_specs())))
    model: Any = getattr(transformers, config.hf_class).from_pretrained(
        None, config=stored, state_dict=weights, dtype=torch.float64
    )
    found = []
    for prompt in prompts:
        inputs = torch.tensor([prompt])
        options = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        ids = model.generate(inputs, attention_mask=torch.ones_like(inputs), **options)
        found.append(ids[0, len(prompt) :].tolist())
    return found


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=[] if kind in QUICK else pytest.mark.slow, id=kind) for kind in ALL]
)
def test_a_batch_with_a_cache_goes_on_as_in_transformers(kind: str) -> None:
    model = model_of(kind)
    assert model.has_cache
    ours = likeliest(model, PROMPTS)
    assert ours == theirs(kind, PROMPTS)
    assert likeliest(model, PROMPTS[1:2]) == ours[1:2], "alone, without padding"
    assert len({token for row in ours for token in row}) > 3, "a model that says one thing would hide a mix-up"


@pytest.mark.parametrize("kind", ["gpt2", "mistral, window", "gemma2", "phi3, longrope"])
def test_beyond_the_longest_sequence_it_is_as_without_a_cache(kind: str) -> None:
    model, plain = model_of(kind), model_of(kind)
    plain.has_cache = False
    # The oldest half is forgotten twice.
    assert likeliest(model, PROMPTS, max_new_tokens=36) == likeliest(plain, PROMPTS, max_new_tokens=36)


def test_each_token_is_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, int]] = []
    attend = Attention.forward

    def watched(self: Attention, x: Tensor, *more: Any) -> Tensor:
        seen.append((x.shape[0], x.shape[1]))
        return attend(self, x, *more)

    monkeypatch.setattr(Attention, "forward", watched)
    likeliest(model_of("gpt2"), [[1, 2, 3], [4, 5]], max_new_tokens=4)
    assert seen[::2] == [(2, 3), (2, 1), (2, 1), (2, 1)]


def test_a_longer_text_goes_on_from_what_has_been_read() -> None:
    """As in a chat, where several tokens come at once."""
    for kind in ("gpt2", "gemma3"):
        model, fresh = model_of(kind), model_of(kind)
        model.next_logits([[3, 1, 4]])
        expected = fresh.next_logits([[3, 1, 4, 1, 5, 9, 2]])
        torch.testing.assert_close(model.next_logits([[3, 1, 4, 1, 5, 9, 2]]), expected)
        for other in ([9, 9], [9, 8, 7]):
            torch.testing.assert_close(model.next_logits([other]), fresh.next_logits([other]))


def test_texts_that_have_ended_leave_the_batch() -> None:
    model, fresh = model_of("gemma3"), model_of("gemma3")
    model.next_logits([[1, 2], [3, 4, 5], [6]])
    torch.testing.assert_close(model.next_logits([[3, 4, 5, 1], [6, 2]]), fresh.next_logits([[3, 4, 5, 1], [6, 2]]))


def test_a_window_keeps_no_more_than_it_needs() -> None:
    specs = config_of("mistral, window", max_positions=2000, num_layers=1).layer_specs()
    layers = SequentialModel(specs, seed=1).eval()
    model = LanguageModel(layers, longest_sequence=2000, device="cpu")
    sizes = []
    for length in range(1000, 1300):
        model.next_logits([[1] * length])
        assert model._cache is not None
        (kept,) = model._cache._layers.values()
        sizes.append(kept.keys.shape[2])
    assert max(sizes) < 3 + 200


@pytest.mark.parametrize("kind", ["gpt2", "phi3, longrope"])
def test_logits_of_texts_of_different_lengths_are_those_of_each(kind: str) -> None:
    model = model_of(kind)
    padded = torch.tensor([[3, 1, 4, 0, 0, 0, 0, 0], [1, 5, 9, 2, 6, 5, 3, 5]])
    found = model.logits(padded, [3, 8])
    torch.testing.assert_close(found[0, :3], model.logits(padded[:1, :3])[0])
    torch.testing.assert_close(found[1], layers_of(kind)(padded[1:])[0])


def test_a_text_beyond_the_longest_sequence_has_no_logits() -> None:
    with pytest.raises(ConfigError, match="a text of 25 tokens is longer than the model's longest sequence, 24 tokens"):
        model_of("gpt2").logits(torch.zeros(1, 25, dtype=torch.int64))


class Mixer(nn.Module):
    """A layer of one's own that looks at other tokens, and knows no cache."""

    def forward(self, x: Tensor) -> Tensor:
        return x + x.cumsum(1) / 8


class Shifted(AttentionHalf):
    """A layer that inherits the word that it supports a cache, and does not."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x + x.roll(1, 1))


@pytest.mark.parametrize("own", [Mixer, Shifted])
def test_layers_of_ones_own_read_the_whole_text_for_each_token(own: type[nn.Module]) -> None:
    specs = config_of("gpt2").layer_specs()
    common = {"dropout": 0.0, "eps": 1e-5, "init_std": 0.3, "residual_std": 0.3}
    mixed = LayerSpec(own, 32, 4, **common, name="own") if own is Shifted else LayerSpec(own, name="own")
    layers = SequentialModel([*specs[:3], mixed, *specs[3:]], seed=1).eval()
    model = LanguageModel(layers, longest_sequence=24, device="cpu")
    assert not model.has_cache
    with torch.no_grad():
        expected = [layers(torch.tensor([prompt]))[0, -1] for prompt in PROMPTS]
    torch.testing.assert_close(model.next_logits(PROMPTS), torch.stack(expected))
