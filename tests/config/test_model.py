"""Presets are the published sizes, and sizes fit together."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from pipekit.config import parse_config
from pipekit.errors import ConfigError
from pipekit.models import preset_families
from pipekit.models.gpt2 import GPT2Config

RELEASED = {  # width, blocks, heads: table 2 of the GPT-2 paper, and the released checkpoints' n_head
    "gpt2": (768, 12, 12),
    "gpt2-medium": (1024, 24, 16),
    "gpt2-large": (1280, 36, 20),
    "gpt2-xl": (1600, 48, 25),
}


@pytest.mark.parametrize("name", RELEASED)
def test_gpt2_presets_are_the_released_models(name: str):
    model = GPT2Config(preset=name)  # type: ignore[arg-type]
    assert (model.hidden_size, model.num_layers, model.num_heads) == RELEASED[name]
    assert (model.vocab_size, model.max_positions, model.ffn_size) == (50257, 1024, 4 * model.hidden_size)


def test_gpt2_presets_have_the_sizes_of_transformers():
    """The default of the reference implementation is the smallest released model."""
    transformers = pytest.importorskip("transformers")
    theirs, ours = transformers.GPT2Config(), GPT2Config(preset="gpt2")
    assert (ours.vocab_size, ours.max_positions, ours.hidden_size) == (
        theirs.vocab_size, theirs.n_positions, theirs.n_embd,
    )  # fmt: skip
    assert (ours.num_layers, ours.num_heads) == (theirs.n_layer, theirs.n_head)
    assert (ours.layer_norm_eps, ours.init_std) == (theirs.layer_norm_epsilon, theirs.initializer_range)


@pytest.mark.parametrize("name", preset_families())
def test_every_preset_loads(name: str):
    parse_config({"model": {"preset": name}, "train": {"steps": 1}})


def test_sizes_beside_a_preset_take_precedence():
    model = GPT2Config(preset="gpt2", num_layers=2, hidden_size=48)
    assert (model.num_layers, model.hidden_size, model.ffn_size, model.num_heads) == (2, 48, 192, 12)
    assert model.num_layer_specs == 8


def test_a_preset_is_not_needed():
    model = GPT2Config(hidden_size=8, num_layers=1, num_heads=2, max_positions=16, vocab_size=10, ffn_size=9)
    assert (model.ffn_size, model.preset) == (9, None)


@pytest.mark.parametrize(
    ("heads", "width", "choices"),
    [(5, 128, "1, 2, 4 or 8"), (3, 8, "1, 2 or 4"), (200, 128, "32, 64 or 128")],
)
def test_heads_divide_the_width(heads: int, width: int, choices: str):
    message = f"model.num_heads={heads} does not divide model.hidden_size={width}; try {choices}"
    with pytest.raises(ConfigError) as caught:
        parse_config({"model": {"preset": "tiny", "num_heads": heads, "hidden_size": width}, "train": {"steps": 1}})
    assert str(caught.value) == message
    with pytest.raises(ValidationError, match="does not divide"):
        GPT2Config(preset="tiny", num_heads=heads, hidden_size=width)


def test_given_leaves_out_what_follows():
    model = GPT2Config(preset="tiny", num_layers=2, dropout=0.1)
    assert model.given() == {"preset": "tiny", "num_layers": 2, "dropout": 0.1}
    assert GPT2Config(**model.given()) == model


def test_vocabulary_size_can_be_filled_in():
    model = GPT2Config(preset="tiny")
    assert model.vocab_size == "auto"
    assert model.fit_vocabulary(100, tokenizer="t.json") == {"model.vocab_size": 100}


def test_a_function_may_be_given_as_text_or_as_a_mapping():
    text, mapping = (
        parse_config({"model": model, "train": {"steps": 1}})
        for model in ("pkg.mod:build", {"builder": "pkg.mod:build"})
    )
    assert text == mapping
    assert text.model.builder == "pkg.mod:build"
    assert text.model.num_layer_specs is None


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            {"family": "auto"},
            "model.family=auto: needs the folder of a Hugging Face model, in which it is read; for example "
            "model.init_from=downloads/gpt2",
        ),
        (
            {"family": "auto", "init_from": "nowhere"},
            "model.init_from: nowhere/config.json: no such file; give the folder of a Hugging Face model, .*",
        ),
    ],
)
def test_a_family_that_no_folder_tells_is_one_error(model: dict[str, str], message: str):
    with pytest.raises(ConfigError, match=f"^{message}$"):
        parse_config({"model": model, "train": {"steps": 1}})
