"""Gemma 2: soft caps on scores, alternating blocks with and without a window, norms before and after attention and MLP.

Source: Gemma Team 2024, "Gemma 2: Improving Open Language Models at a Practical Size".
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import Field, PositiveFloat, PositiveInt

from pipekit.errors import ConfigError
from pipekit.models.decoder import DecoderFamily, decoder_sizes
from pipekit.models.family import TransformerFamily, Width


class GemmaFamily(DecoderFamily):
    """A decoder with a scaled embedding, norms that multiply by 1 + weight, and two types of blocks."""

    head_size: Width | None = Field(default=256, examples=[64])
    """Width of a head; null means `hidden_size / num_heads`."""

    query_size: Width = Field(default=256, examples=[256])
    """Attention scores are divided by the square root of this."""

    tied_embedding: bool = True
    """The head shares the weight of the token embedding."""

    @property
    def norm(self) -> Literal["rms", "offset_rms"]:
        return "offset_rms"

    @property
    def norm_place(self) -> Literal["before", "after", "both"]:
        return "both"

    @property
    def activation(self) -> Literal["silu", "gelu_tanh"]:
        return "gelu_tanh"

    @property
    def attention_scale(self) -> float | None:
        return 1 / math.sqrt(self.query_size)

    @property
    def embedding_scale(self) -> float | None:
        return math.sqrt(self.hidden_size)

    @property
    def layer_types(self) -> list[str]:
        """Type of each block in a `config.json`."""
        windows = map(self.window_of, range(self.num_layers))
        return ["full_attention" if window is None else "sliding_attention" for window in windows]

    def hf_config(self, *, end_token_id: int | None, dtype: str) -> dict[str, Any]:
        return {**super().hf_config(end_token_id=end_token_id, dtype=dtype), "layer_types": self.layer_types}

    @classmethod
    def from_hf_config(cls, stored: Mapping[str, Any], *, where: str) -> TransformerFamily:
        model = super().from_hf_config(stored, where=where)
        assert isinstance(model, GemmaFamily)
        kinds = list(stored.get("layer_types") or model.layer_types)
        if kinds != model.layer_types:
            raise ConfigError(f"{where}/config.json: layer_types={kinds}; only {model.layer_types} is known")
        return model


class Gemma2Config(GemmaFamily):
    """Gemma 2 model. A preset provides the sizes of a released model where they are not given.

    Example:
        >>> model = Gemma2Config(preset="gemma-2-2b")
        >>> [model.window_of(block) for block in range(3)]
        [4096, None, 4096]
    """

    presets: ClassVar = {
        "gemma-2-2b": decoder_sizes(256000, 2304, 26, 8, 8192, 9216, num_kv_heads=4),
        "gemma-2-9b": decoder_sizes(256000, 3584, 42, 16, 8192, 14336, num_kv_heads=8),
        "gemma-2-27b": decoder_sizes(
            256000, 4608, 46, 32, 8192, 36864, num_kv_heads=16, head_size=128, query_size=144
        ),
    }  # fmt: skip
    hf_model_type: ClassVar = "gemma2"
    hf_class: ClassVar = "Gemma2ForCausalLM"
    hf_keys: ClassVar = {
        **DecoderFamily.hf_keys,
        "sliding_window": "sliding_window",
        "query_size": "query_pre_attn_scalar",
        "attention_bias": "attention_bias",
        "attention_soft_cap": "attn_logit_softcapping",
        "final_soft_cap": "final_logit_softcapping",
    }
    hf_fixed: ClassVar = {
        "hidden_activation": ("gelu_pytorch_tanh",),
        "use_bidirectional_attention": (None, False),
    }

    family: Literal["gemma2"] = "gemma2"
    """Architecture of the blocks."""

    preset: Literal["gemma-2-2b", "gemma-2-9b", "gemma-2-27b"] | None = None
    """Named sizes; any size that you also give overrides it."""

    sliding_window: PositiveInt = Field(default=4096, examples=[4096])
    """Size of the attention window in tokens, including the token itself, in every other block, starting with the
    first."""

    attention_bias: bool = False
    """The linear layers of attention have biases."""

    attention_soft_cap: PositiveFloat | None = 50.0
    """Limit that attention scores approach; null sets no limit."""

    final_soft_cap: PositiveFloat | None = 30.0
    """Limit that logits approach; null sets no limit."""

    @property
    def has_qkv_bias(self) -> bool:
        return self.attention_bias

    @property
    def has_projection_bias(self) -> bool:
        return self.attention_bias

    @property
    def logit_cap(self) -> float | None:
        return self.final_soft_cap

    def window_of(self, block: int) -> int | None:
        return None if block % 2 else self.sliding_window

    def _attention_options(self, block: int) -> dict[str, Any]:
        cap = {} if self.attention_soft_cap is None else {"soft_cap": self.attention_soft_cap}
        return {**super()._attention_options(block), **cap}


FAMILY = Gemma2Config
