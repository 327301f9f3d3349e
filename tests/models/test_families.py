"""The families, found by their files, and the model of a configuration."""

from __future__ import annotations

from pipekit.config import parse_config
from pipekit.models import build_layers
from pipekit.models.gpt2 import GPT2Config


def test_a_family_is_built_from_its_sizes() -> None:
    sizes = {"preset": "tiny", "vocab_size": 300, "num_layers": 2}
    specs = build_layers(parse_config({"model": sizes, "train": {"steps": 1}}))
    assert list(map(repr, specs)) == list(map(repr, GPT2Config(**sizes).layer_specs()))
