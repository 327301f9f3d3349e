"""Direct calls between modules: fewer of them, and the same numbers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from pipekit.config import parse_config
from pipekit.inference.direct_calls import call_directly
from pipekit.layers.sequential import SequentialModel
from pipekit.models import adapted_layers, build_layers

MODELS: dict[str, dict[str, Any]] = {
    "gpt2": {"family": "gpt2"},
    "grouped heads and RMS norms": {"family": "llama", "num_kv_heads": 2},
    "norms of heads": {"family": "qwen3", "num_kv_heads": 2, "head_size": 8},
}


def build(model: dict[str, Any], **sections: Any) -> SequentialModel:
    sizes = {"vocab_size": 61, "hidden_size": 32, "num_layers": 2, "num_heads": 4, "max_positions": 16}
    config = parse_config({"model": {**sizes, **model}, "train": {"steps": 1, "sequence_length": 16}, **sections})
    built = SequentialModel(adapted_layers(config, build_layers(config))).eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return built


@pytest.mark.parametrize("sections", [{}, {"lora": {"rank": 2}}], ids=["plain", "adapters"])
@pytest.mark.parametrize("model", MODELS.values(), ids=list(MODELS))
@torch.no_grad()
def test_outputs_are_the_same_to_the_bit(model: dict[str, Any], sections: dict[str, Any]) -> None:
    built = build(model, **sections)
    tokens = torch.arange(12).reshape(1, 12) * 5
    expected = built(tokens)
    call_directly(built)
    assert torch.equal(built(tokens), expected)


@torch.no_grad()
def test_hooks_are_called_as_before_and_what_has_none_is_a_function() -> None:
    built = build({"family": "gpt2"})
    seen: list[str] = []
    mlp = built.get_submodule("layers.3")
    mlp.get_submodule("expand").register_forward_hook(lambda *_: seen.append("expand"))
    call_directly(built)
    built(torch.arange(4).reshape(1, 4))
    assert seen == ["expand"]
    assert isinstance(mlp.expand, nn.Module)
    assert not isinstance(mlp.contract, nn.Module)
