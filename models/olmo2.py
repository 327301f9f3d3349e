"""OLMo 2: norms after attention and MLP, and over all queries and all keys of a token.

Source: OLMo Team 2024, "2 OLMo 2 Furious".
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pipekit.models.decoder import DecoderFamily, decoder_sizes
from pipekit.models.family import Epsilon

_COMMON: dict[str, Any] = {"rotary_base": 500_000.0, "rms_norm_eps": 1e-6}


class OLMo2Config(DecoderFamily):
    """OLMo 2 model. A preset provides the sizes of a released model where they are not given.

    Example:
        >>> OLMo2Config(preset="olmo-2-1b").num_layer_specs
        35
    """

    presets: ClassVar = {
        "olmo-2-1b": decoder_sizes(100352, 2048, 16, 16, 4096, 8192, **_COMMON),
        "olmo-2-7b": decoder_sizes(100352, 4096, 32, 32, 4096, 11008, **_COMMON),
        "olmo-2-13b": decoder_sizes(100352, 5120, 40, 40, 4096, 13824, **_COMMON),
        "olmo-2-32b": decoder_sizes(100352, 5120, 64, 40, 4096, 27648, num_kv_heads=8, **_COMMON),
    }
    hf_model_type: ClassVar = "olmo2"
    hf_class: ClassVar = "Olmo2ForCausalLM"
    hf_keys: ClassVar = {**DecoderFamily.hf_keys, "attention_bias": "attention_bias"}

    family: Literal["olmo2"] = "olmo2"
    """Architecture of the blocks."""

    preset: Literal["olmo-2-1b", "olmo-2-7b", "olmo-2-13b", "olmo-2-32b"] | None = None
    """Named sizes; any size that you also give overrides it."""

    rms_norm_eps: Epsilon = 1e-5
    """Added to the mean square in every norm."""

    attention_bias: bool = False
    """The linear layers of attention have biases."""

    @property
    def norm_place(self) -> Literal["before", "after", "both"]:
        return "after"

    @property
    def qk_norm(self) -> Literal["head", "width"] | None:
        return "width"

    @property
    def has_qkv_bias(self) -> bool:
        return self.attention_bias

    @property
    def has_projection_bias(self) -> bool:
        return self.attention_bias


FAMILY = OLMo2Config
