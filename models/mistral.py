"""Mistral 7B: a Llama with grouped queries, whose attention may be limited to a window.

Source: Jiang et al. 2023, "Mistral 7B".
"""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field, PositiveInt

from pipekit.models.decoder import DecoderFamily, decoder_sizes

_COMMON = {"num_kv_heads": 8, "rms_norm_eps": 1e-5}


class MistralConfig(DecoderFamily):
    """Mistral model. A preset provides the sizes of a released model where they are not given.

    Example:
        >>> MistralConfig(preset="mistral-7b-v0.1").window_of(0)
        4096
    """

    presets: ClassVar = {
        "mistral-7b-v0.1": decoder_sizes(32000, 4096, 32, 32, 32768, 14336, **_COMMON, sliding_window=4096),
        "mistral-7b-v0.3": decoder_sizes(32768, 4096, 32, 32, 32768, 14336, **_COMMON, rotary_base=1_000_000.0),
        "mistral-nemo": decoder_sizes(
            131072, 5120, 40, 32, 131072, 14336, **_COMMON, head_size=128, rotary_base=1_000_000.0
        ),
    }
    hf_model_type: ClassVar = "mistral"
    hf_class: ClassVar = "MistralForCausalLM"
    hf_keys: ClassVar = {**DecoderFamily.hf_keys, "sliding_window": "sliding_window"}

    family: Literal["mistral"] = "mistral"
    """Architecture of the blocks."""

    preset: Literal["mistral-7b-v0.1", "mistral-7b-v0.3", "mistral-nemo"] | None = None
    """Named sizes; any size that you also give overrides it."""

    sliding_window: PositiveInt | None = Field(default=None, examples=[4096])
    """Size of the attention window in tokens, including the token itself; null attends to all earlier tokens."""

    def window_of(self, block: int) -> int | None:
        return self.sliding_window


FAMILY = MistralConfig
