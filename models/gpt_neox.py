"""GPT-NeoX and Pythia: rotary positions in a part of each head, attention and MLP of a block in parallel.

Source: Black et al. 2022, "GPT-NeoX-20B: An Open-Source Autoregressive Language Model"; Biderman et al. 2023, "Pythia:
A Suite for Analyzing Large Language Models Across Training and Scaling".
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import product
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field, PositiveFloat, model_validator

from pipekit.errors import ConfigError
from pipekit.models.family import (
    Epsilon,
    InitStd,
    LossChunk,
    TensorRename,
    TransformerFamily,
    preset_sizes,
    setting_error,
)
from pipekit.settings.base import alternatives

if TYPE_CHECKING:
    from pipekit.layers.specs import LayerSpec


class GPTNeoXConfig(TransformerFamily):
    """GPT-NeoX model. A preset provides the sizes of a released Pythia model where they are not given.

    Example:
        >>> GPTNeoXConfig(preset="pythia-70m").num_layer_specs
        9
    """

    presets: ClassVar = {
        "pythia-14m": preset_sizes(50304, 128, 6, 4, 2048),
        "pythia-70m": preset_sizes(50304, 512, 6, 8, 2048),
        "pythia-160m": preset_sizes(50304, 768, 12, 12, 2048),
        "pythia-410m": preset_sizes(50304, 1024, 24, 16, 2048),
        "pythia-1b": preset_sizes(50304, 2048, 16, 8, 2048),
        "pythia-1.4b": preset_sizes(50304, 2048, 24, 16, 2048),
        "pythia-2.8b": preset_sizes(50304, 2560, 32, 32, 2048),
        "pythia-6.9b": preset_sizes(50432, 4096, 32, 32, 2048),
        "pythia-12b": preset_sizes(50688, 5120, 36, 40, 2048),
    }
    hf_model_type: ClassVar = "gpt_neox"
    hf_class: ClassVar = "GPTNeoXForCausalLM"
    hf_keys: ClassVar = {
        "vocab_size": "vocab_size",
        "hidden_size": "hidden_size",
        "num_layers": "num_hidden_layers",
        "num_heads": "num_attention_heads",
        "max_positions": "max_position_embeddings",
        "ffn_size": "intermediate_size",
        "dropout": "hidden_dropout",
        "activation": "hidden_act",
        "rotary_pct": "rotary_pct",
        "rotary_base": "rotary_emb_base",
        "use_parallel_residual": "use_parallel_residual",
        "tied_embedding": "tie_word_embeddings",
        "layer_norm_eps": "layer_norm_eps",
        "init_std": "initializer_range",
    }
    hf_fixed: ClassVar = {"attention_bias": (True,)}
    other_layers: ClassVar = 3

    family: Literal["gpt_neox"] = "gpt_neox"
    """Architecture of the blocks."""

    preset: (
        Literal[
            "pythia-14m",
            "pythia-70m",
            "pythia-160m",
            "pythia-410m",
            "pythia-1b",
            "pythia-1.4b",
            "pythia-2.8b",
            "pythia-6.9b",
            "pythia-12b",
        ]
        | None
    ) = None
    """Named sizes; any size that you also give overrides it."""

    rotary_pct: Annotated[float, Field(gt=0, le=1)] = 0.25
    """Fraction of each head's dimensions that have rotary positions."""

    rotary_base: PositiveFloat = Field(default=10_000.0, examples=[10_000.0])
    """Base of the rotary wavelengths (RoPE theta)."""

    use_parallel_residual: bool = True
    """Attention and MLP of a block both read its input, and form one layer; otherwise the MLP reads the input plus the
    output of attention."""

    activation: Literal["gelu", "gelu_tanh"] = "gelu"
    """Activation function of an MLP: GELU, or its tanh approximation."""

    tied_embedding: bool = False
    """The head shares the weight of the token embedding."""

    layer_norm_eps: Epsilon = 1e-5
    """Added to the variance in every layer norm."""

    init_std: InitStd | None = Field(default=None, examples=[0.02])
    """Standard deviation of the initial weights; null uses the paper's, which depend on the width and, for the last
    projections of attention and MLP, on the number of blocks."""

    @property
    def layers_per_block(self) -> int:
        return 1 if self.use_parallel_residual else 2

    @property
    def rotary_size(self) -> int:
        """Number of dimensions of each head that are rotated."""
        return int(self.hidden_size // self.num_heads * self.rotary_pct)

    def layer_specs(self, *, loss_chunk_tokens: LossChunk = None) -> list[LayerSpec]:
        """Token embedding, one layer or two halves for each block, final norm, head.

        Example:
            >>> specs = GPTNeoXConfig(preset="pythia-70m", num_layers=1).layer_specs()
            >>> [spec.type_name for spec in specs]
            ['TokenEmbedding', 'ParallelBlock', 'FinalNorm', 'Head']
        """
        from pipekit.layers.specs import LayerSpec
        from pipekit.models import transformer

        width, eps = self.hidden_size, self.layer_norm_eps
        if self.init_std is None:
            # Nguyen & Salazar 2019; Wang & Komatsuzaki 2021.
            std, residual_std = math.sqrt(2 / (5 * width)), 2 / (self.num_layers * math.sqrt(width))
        else:
            std, residual_std = self.init_std, self.init_std / math.sqrt(2 * self.num_layers)
        embedding, head = transformer.embedding_and_head(
            self.known_vocab_size,
            width,
            loss_chunk_tokens,
            tied=self.tied_embedding,
            dropout=self.dropout,
            init_std=std,
        )
        common = {"dropout": self.dropout, "eps": eps, "init_std": std, "residual_std": residual_std}
        rotary = transformer.Rotary(self.rotary_size, self.rotary_base)
        attention = {"rotary": rotary, **self.sparse_options, **common}
        mlp = {"activation": self.activation}
        heads, ffn_size = self.num_heads, self.ffn_size
        specs = [embedding]
        for name in (f"blocks.{block}" for block in range(self.num_layers)):
            if self.use_parallel_residual:
                specs.append(
                    LayerSpec(transformer.ParallelBlock, width, heads, ffn_size, **mlp, **attention, name=name)
                )
            else:
                specs += [
                    LayerSpec(transformer.AttentionHalf, width, heads, **attention, name=f"{name}.attention"),
                    LayerSpec(transformer.MLPHalf, width, ffn_size, **mlp, **common, name=f"{name}.mlp"),
                ]
        return [*specs, LayerSpec(transformer.FinalNorm, width, eps=eps, name="final_norm"), head]

    def hf_config(self, *, end_token_id: int | None, dtype: str) -> dict[str, Any]:
        return {
            **super().hf_config(end_token_id=end_token_id, dtype=dtype),
            "hidden_act": _THEIR_ACTIVATIONS[self.activation][0],
            "attention_dropout": self.dropout,
            "initializer_range": 0.02 if self.init_std is None else self.init_std,
        }

    @classmethod
    def from_hf_config(cls, stored: Mapping[str, Any], *, where: str) -> TransformerFamily:
        rope = stored.get("rope_parameters") or {}  # where transformers 5 writes them
        named = {"rotary_emb_base": rope.get("rope_theta"), "rotary_pct": rope.get("partial_rotary_factor")}
        stored = {**stored, **{key: value for key, value in named.items() if value is not None}}
        scaling = stored.get("rope_scaling") or rope
        kind = scaling.get("rope_type", scaling.get("type", "default"))
        if kind != "default":
            raise ConfigError(f"{where}/config.json: rope_type={kind!r}; only 'default' is known")
        theirs = stored.get("hidden_act", "gelu")
        ours = next((ours for ours, names in _THEIR_ACTIVATIONS.items() if theirs in names), None)
        if ours is None:
            known = alternatives(repr(name) for names in _THEIR_ACTIVATIONS.values() for name in names)
            raise ConfigError(f"{where}/config.json: hidden_act={theirs!r}; only {known} is known")
        base = float(stored.get("rotary_emb_base", 10_000))
        return super().from_hf_config({**stored, "hidden_act": ours, "rotary_emb_base": base}, where=where)

    def hf_renames(self) -> list[TensorRename]:
        outside = {
            "embed.weight": "embed_in.weight",
            "final_norm.weight": "final_layer_norm.weight",
            "final_norm.bias": "final_layer_norm.bias",
        }
        parts = {
            "attention.norm": "input_layernorm",
            "attention.qkv": "attention.query_key_value",
            "attention.projection": "attention.dense",
            "mlp.norm": "post_attention_layernorm",
            "mlp.expand": "mlp.dense_h_to_4h",
            "mlp.contract": "mlp.dense_4h_to_h",
        }
        # Theirs has queries, keys and values of each head together, ours each of all heads.
        sizes = {"three": 3, "heads": self.num_heads}
        patterns = {
            "attention.qkv.weight": "(three heads size) columns -> (heads three size) columns",
            "attention.qkv.bias": "(three heads size) -> (heads three size)",
        }
        renames = [TensorRename(ours, f"gpt_neox.{theirs}") for ours, theirs in outside.items()]
        for block, (ours, theirs), kind in product(range(self.num_layers), parts.items(), ("weight", "bias")):
            our_name, their_name = f"blocks.{block}.{ours}.{kind}", f"gpt_neox.layers.{block}.{theirs}.{kind}"
            pattern = patterns.get(f"{ours}.{kind}")
            renames.append(TensorRename(our_name, their_name, pattern, sizes if pattern else {}))
        return renames if self.tied_embedding else [*renames, TensorRename("head.weight", "embed_out.weight")]

    @model_validator(mode="after")
    def _rotates_pairs(self) -> GPTNeoXConfig:
        if self.rotary_size < 2 or self.rotary_size % 2:
            head_size = self.hidden_size // self.num_heads
            text = f"model.rotary_pct={self.rotary_pct} of the {head_size} dimensions of a head are {self.rotary_size}"
            fitting = [pct for pct in (0.25, 0.5, 1.0) if int(head_size * pct) in range(2, head_size + 1, 2)]
            remedy = f"try {alternatives(fitting)}" if fitting else "make heads of an even size"
            raise setting_error("rotary_pct", f"{text}, and pairs of dimensions are rotated; {remedy}")
        return self


_THEIR_ACTIVATIONS = {"gelu": ("gelu",), "gelu_tanh": ("gelu_new", "gelu_fast", "gelu_pytorch_tanh")}
"""Names that `transformers` has for each activation; the first is written."""

FAMILY = GPTNeoXConfig
