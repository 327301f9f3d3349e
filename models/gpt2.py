"""GPT-2: learned positions, layer norm before each half of a block, GELU by its tanh approximation, a tied head.

Source: Radford et al. 2019, "Language Models are Unsupervised Multitask Learners".
"""

from __future__ import annotations

import math
from itertools import product
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, PositiveInt, model_validator

from pipekit.models.family import (
    AttentionHeads,
    Epsilon,
    InitStd,
    LossChunk,
    TensorRename,
    TransformerFamily,
    divisors,
    preset_sizes,
    setting_error,
)
from pipekit.settings.base import alternatives

if TYPE_CHECKING:
    from pipekit.layers.specs import LayerSpec


class GPT2Config(TransformerFamily):
    """GPT-2 model. A preset provides the sizes that are not given; the `gpt2` presets are the released models.

    Example:
        >>> GPT2Config(preset="tiny", num_layers=2).ffn_size
        512
    """

    presets: ClassVar = {
        "tiny": preset_sizes("auto", 128, 4, 4, 256),
        "mini": preset_sizes("auto", 256, 6, 8, 512),
        "gpt2": preset_sizes(50257, 768, 12, 12, 1024),
        "gpt2-medium": preset_sizes(50257, 1024, 24, 16, 1024),
        "gpt2-large": preset_sizes(50257, 1280, 36, 20, 1024),
        "gpt2-xl": preset_sizes(50257, 1600, 48, 25, 1024),
    }
    hf_model_type: ClassVar = "gpt2"
    hf_class: ClassVar = "GPT2LMHeadModel"
    hf_keys: ClassVar = {
        "vocab_size": "vocab_size",
        "hidden_size": "n_embd",
        "num_layers": "n_layer",
        "num_heads": "n_head",
        "max_positions": "n_positions",
        "ffn_size": "n_inner",
        "dropout": "resid_pdrop",
        "tied_embedding": "tie_word_embeddings",
        "layer_norm_eps": "layer_norm_epsilon",
        "init_std": "initializer_range",
    }
    hf_fixed: ClassVar = {
        "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
        "scale_attn_weights": (True,),
        "scale_attn_by_inverse_layer_idx": (False,),
        "add_cross_attention": (False,),
    }
    other_layers: ClassVar = 4

    family: Literal["gpt2"] = "gpt2"
    """Architecture of the blocks."""

    preset: Literal["tiny", "mini", "gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"] | None = None
    """Named sizes; any size that you also give overrides it."""

    num_kv_heads: PositiveInt | None = Field(default=None, examples=[2])
    """Number of key and value heads, each shared by `num_heads / num_kv_heads` query heads; null gives every query head
    its own."""

    tied_embedding: bool = True
    """The head shares the weight of the token embedding."""

    layer_norm_eps: Epsilon = 1e-5
    """Added to the variance in every layer norm."""

    init_std: InitStd = 0.02
    """Standard deviation of the initial weights."""

    @property
    def attention_heads(self) -> AttentionHeads:
        return AttentionHeads(self.num_heads, self.num_kv_heads or self.num_heads)

    def layer_specs(self, *, loss_chunk_tokens: LossChunk = None) -> list[LayerSpec]:
        """Token and position embedding, two halves for each block, final norm, head.

        Example:
            >>> specs = GPT2Config(preset="tiny", vocab_size=512, num_layers=1).layer_specs()
            >>> [spec.type_name for spec in specs]
            ['TokenEmbedding', 'PositionEmbedding', 'AttentionHalf', 'MLPHalf', 'FinalNorm', 'TokenEmbedding']
        """
        from pipekit.layers.specs import LayerSpec
        from pipekit.models.transformer import AttentionHalf, FinalNorm, MLPHalf, PositionEmbedding, embedding_and_head

        width, std, eps = self.hidden_size, self.init_std, self.layer_norm_eps
        embedding, head = embedding_and_head(
            self.known_vocab_size, width, loss_chunk_tokens, tied=self.tied_embedding, init_std=std
        )
        positions = LayerSpec(
            PositionEmbedding, self.max_positions, width, dropout=self.dropout, init_std=std, name="position"
        )
        # Two residual additions a block: their sum keeps its size at any depth.
        residual_std = std / math.sqrt(2 * self.num_layers)
        common = {"dropout": self.dropout, "eps": eps, "init_std": std, "residual_std": residual_std}
        heads = {} if self.num_kv_heads is None else {"num_kv_heads": self.num_kv_heads}
        attention = {**heads, **self.sparse_options, **common}
        blocks = []
        for block in range(self.num_layers):
            blocks += [
                LayerSpec(AttentionHalf, width, self.num_heads, **attention, name=f"blocks.{block}.attention"),
                LayerSpec(MLPHalf, width, self.ffn_size, activation="gelu_tanh", **common, name=f"blocks.{block}.mlp"),
            ]
        return [embedding, positions, *blocks, LayerSpec(FinalNorm, width, eps=eps, name="final_norm"), head]

    def no_export_reason(self) -> str | None:
        if self.num_kv_heads in (None, self.num_heads):
            return super().no_export_reason()
        return (
            f"has model.num_kv_heads={self.num_kv_heads} for {self.num_heads} heads, and {self.hf_class} knows no "
            "grouped queries"
        )

    def hf_config(self, *, end_token_id: int | None, dtype: str) -> dict[str, Any]:
        everywhere = {"n_ctx": self.max_positions, "attn_pdrop": self.dropout, "embd_pdrop": self.dropout}
        return {**super().hf_config(end_token_id=end_token_id, dtype=dtype), **everywhere}

    def hf_renames(self) -> list[TensorRename]:
        outside = {
            "embed.weight": "wte.weight",
            "position.weight": "wpe.weight",
            "final_norm.weight": "ln_f.weight",
            "final_norm.bias": "ln_f.bias",
        }
        halves = {
            "attention.norm": "ln_1",
            "attention.qkv": "attn.c_attn",
            "attention.projection": "attn.c_proj",
            "mlp.norm": "ln_2",
            "mlp.expand": "mlp.c_fc",
            "mlp.contract": "mlp.c_proj",
        }
        renames = [TensorRename(ours, f"transformer.{theirs}") for ours, theirs in outside.items()]
        for block, (ours, theirs) in product(range(self.num_layers), halves.items()):
            our_name, their_name = f"blocks.{block}.{ours}", f"transformer.h.{block}.{theirs}"
            # Their Conv1D is (in, out) where ours is (out, in).
            pattern = None if ours.endswith("norm") else "rows columns -> columns rows"
            renames.append(TensorRename(f"{our_name}.weight", f"{their_name}.weight", pattern))
            renames.append(TensorRename(f"{our_name}.bias", f"{their_name}.bias"))
        return renames if self.tied_embedding else [*renames, TensorRename("head.weight", "lm_head.weight")]

    @model_validator(mode="after")
    def _heads_share_keys(self) -> GPT2Config:
        if self.num_kv_heads is not None and self.num_heads % self.num_kv_heads:
            text = f"model.num_kv_heads={self.num_kv_heads} does not divide model.num_heads={self.num_heads}"
            raise setting_error("num_kv_heads", f"{text}; try {alternatives(divisors(self.num_heads))}")
        return self


FAMILY = GPT2Config
