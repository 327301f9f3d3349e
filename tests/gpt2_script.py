"""A GPT-2 as a DeepSpeed script may have written it: layers under names of its own, and the door to `transformers`."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

VOCAB, WIDTH, HEADS, BLOCKS, SEQUENCE = 29, 16, 2, 2, 12

MODEL = {
    "builder": "gpt2_script:build_layers",
    "hf_names": "gpt2_script:hf_names",
    "hf_config": "gpt2_script:hf_config",
}
"""The `model` section that describes it."""


class Positions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(SEQUENCE, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.table(torch.arange(x.shape[1], device=x.device))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)])
        self.attention = nn.ModuleList([nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)])
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU("tanh"), nn.Linear(4 * WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        shape = (*x.shape[:2], HEADS, WIDTH // HEADS)
        q, k, v = (part.view(shape).transpose(1, 2) for part in self.attention[0](self.norms[0](x)).chunk(3, -1))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(x.shape)
        x = x + self.attention[1](mixed)
        return x + self.mlp(self.norms[1](x))


def scores(embedding: nn.Embedding, x: Tensor) -> Tensor:
    return F.linear(x, embedding.weight)


def layers(layer_spec: Any, tied_layer_spec: Any) -> list[Any]:
    """The model, as a list of DeepSpeed's classes of specs or of pipekit's."""
    return [
        tied_layer_spec("tokens", nn.Embedding, VOCAB, WIDTH),
        layer_spec(Positions),
        *(layer_spec(Block) for _ in range(BLOCKS)),
        layer_spec(nn.LayerNorm, WIDTH),
        tied_layer_spec("tokens", nn.Embedding, VOCAB, WIDTH, forward_fn=scores),
    ]


class Whole(nn.Module):
    """The same layers under the same names in a plain module."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCAB, WIDTH)
        blocks = {str(index + 2): Block() for index in range(BLOCKS)}
        self.layers = nn.ModuleDict({"1": Positions(), **blocks, str(BLOCKS + 2): nn.LayerNorm(WIDTH)})

    def forward(self, x: Tensor) -> Tensor:
        x = self.tokens(x)
        for layer in self.layers.values():
            x = layer(x)
        return F.linear(x, self.tokens.weight)


def prompt() -> Tensor:
    return torch.randint(VOCAB, (4, SEQUENCE), generator=torch.Generator().manual_seed(5))


def build_layers(config: Any) -> list[Any]:
    from pipekit import LayerSpec, TiedLayerSpec

    return layers(LayerSpec, TiedLayerSpec)


def hf_names(config: Any) -> dict[str, Any]:
    from pipekit.models.family import TensorRename

    names: dict[str, Any] = {
        "tokens.weight": "transformer.wte.weight",
        "layers.1.table.weight": "transformer.wpe.weight",
    }
    parts = {
        "norms.0": "ln_1",
        "norms.1": "ln_2",
        "attention.0": "attn.c_attn",
        "attention.1": "attn.c_proj",
        "mlp.0": "mlp.c_fc",
        "mlp.2": "mlp.c_proj",
    }
    for block in range(BLOCKS):
        for ours, theirs in parts.items():
            own, their = f"layers.{block + 2}.{ours}", f"transformer.h.{block}.{theirs}"
            names[f"{own}.bias"] = f"{their}.bias"
            turn = None if ours.startswith("norms") else "rows columns -> columns rows"
            names[f"{own}.weight"] = TensorRename(f"{own}.weight", f"{their}.weight", turn)
    last = f"layers.{BLOCKS + 2}"
    return names | {f"{last}.weight": "transformer.ln_f.weight", f"{last}.bias": "transformer.ln_f.bias"}


def hf_config(config: Any) -> dict[str, Any]:
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "vocab_size": VOCAB,
        "n_embd": WIDTH,
        "n_layer": BLOCKS,
        "n_head": HEADS,
        "n_positions": SEQUENCE,
    }
