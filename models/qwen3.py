"""Qwen3: a Llama whose queries and keys have a norm for each head.

Source: Qwen Team 2025, "Qwen3 Technical Report".
"""

from __future__ import annotations

from typing import ClassVar, Literal

from pipekit.models.decoder import DecoderFamily, decoder_sizes
from pipekit.models.qwen2 import WindowedFamily

_COMMON = {"num_kv_heads": 8, "head_size": 128, "rotary_base": 1_000_000.0}


class Qwen3Config(WindowedFamily):
    """Qwen3 model. A preset provides the sizes of a released model where they are not given.

    Example:
        >>> Qwen3Config(preset="qwen3-0.6b").known_head_size
        128
    """

    presets: ClassVar = {
        "qwen3-0.6b": decoder_sizes(151936, 1024, 28, 16, 40960, 3072, **_COMMON, tied_embedding=True),
        "qwen3-1.7b": decoder_sizes(151936, 2048, 28, 16, 40960, 6144, **_COMMON, tied_embedding=True),
        "qwen3-4b": decoder_sizes(151936, 2560, 36, 32, 40960, 9728, **_COMMON, tied_embedding=True),
        "qwen3-8b": decoder_sizes(151936, 4096, 36, 32, 40960, 12288, **_COMMON),
    }
    hf_model_type: ClassVar = "qwen3"
    hf_class: ClassVar = "Qwen3ForCausalLM"
    hf_keys: ClassVar = {
        **DecoderFamily.hf_keys,
        "sliding_window": "sliding_window",
        "first_window_layer": "max_window_layers",
        "attention_bias": "attention_bias",
    }

    family: Literal["qwen3"] = "qwen3"
    """Architecture of the blocks."""

    preset: Literal["qwen3-0.6b", "qwen3-1.7b", "qwen3-4b", "qwen3-8b"] | None = None
    """Named sizes; any size that you also give overrides it."""

    attention_bias: bool = False
    """The linear layers of attention have biases."""

    @property
    def has_qkv_bias(self) -> bool:
        return self.attention_bias

    @property
    def has_projection_bias(self) -> bool:
        return self.attention_bias

    @property
    def qk_norm(self) -> Literal["head", "width"] | None:
        return "head"


FAMILY = Qwen3Config
