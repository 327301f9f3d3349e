"""Gemma 3: five blocks with a window for each block without, and norms before and after each half of a block.

Source: Gemma Team 2025, "Gemma 3 Technical Report".
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import Field, PositiveFloat, PositiveInt

from pipekit.errors import ConfigError
from pipekit.models.decoder import DecoderFamily, decoder_sizes
from pipekit.models.gemma2 import GemmaFamily
from pipekit.models.rotary_scaling import RotaryScaling

_COMMON = {"num_kv_heads": 1, "sliding_window": 512}


class Gemma3Config(GemmaFamily):
    """Gemma 3 model for text. A preset provides the sizes of a released model where they are not given.

    Example:
        >>> model = Gemma3Config(preset="gemma-3-270m")
        >>> [model.window_of(block) for block in range(7)]
        [512, 512, 512, 512, 512, None, 512]
    """

    presets: ClassVar = {
        "gemma-3-270m": decoder_sizes(262144, 640, 18, 4, 32768, 2048, **_COMMON),
        "gemma-3-1b": decoder_sizes(262144, 1152, 26, 4, 32768, 6912, **_COMMON),
    }
    hf_model_type: ClassVar = "gemma3_text"
    hf_class: ClassVar = "Gemma3ForCausalLM"
    hf_keys: ClassVar = {
        **DecoderFamily.hf_keys,
        "sliding_window": "sliding_window",
        "global_every": "sliding_window_pattern",
        "local_rotary_base": "rope_local_base_freq",
        "query_size": "query_pre_attn_scalar",
    }
    hf_fixed: ClassVar = {
        "hidden_activation": ("gelu_pytorch_tanh",),
        "attention_bias": (False,),
        "final_logit_softcapping": (None,),
        "attn_logit_softcapping": (None,),
        "use_bidirectional_attention": (False, None),
    }

    family: Literal["gemma3"] = "gemma3"
    """Architecture of the blocks."""

    preset: Literal["gemma-3-270m", "gemma-3-1b"] | None = None
    """Named sizes; any size that you also give overrides it."""

    rotary_base: PositiveFloat = Field(default=1_000_000.0, examples=[500_000.0])
    """Base of the rotary wavelengths in blocks that attend to the whole sequence."""

    local_rotary_base: PositiveFloat = Field(default=10_000.0, examples=[10_000.0])
    """Base of the rotary wavelengths in blocks with a window, which are never scaled."""

    sliding_window: PositiveInt = Field(default=1024, examples=[512])
    """Size of the attention window in tokens, including the token itself, in blocks that have one."""

    global_every: PositiveInt = Field(default=6, examples=[6])
    """Every `global_every`-th block attends to the whole sequence; the others have a window."""

    @property
    def qk_norm(self) -> Literal["head", "width"] | None:
        return "head"

    def _is_global(self, block: int) -> bool:
        return (block + 1) % self.global_every == 0

    def window_of(self, block: int) -> int | None:
        return None if self._is_global(block) else self.sliding_window

    def rotary_of(self, block: int) -> tuple[float, RotaryScaling | None]:
        return super().rotary_of(block) if self._is_global(block) else (self.local_rotary_base, None)

    @classmethod
    def _settings_of(cls, stored: Mapping[str, Any], *, where: str) -> Mapping[str, Any]:
        settings = {**super()._settings_of(stored, where=where)}
        kinds = stored.get("layer_types")
        if kinds is not None:
            every = list(kinds).index("full_attention") + 1 if "full_attention" in kinds else len(kinds) + 1
            settings["sliding_window_pattern"] = stored.get("sliding_window_pattern", every)
        rope = stored.get("rope_parameters") or {}
        if "full_attention" in rope:
            settings["rope_parameters"] = rope["full_attention"]
            local = rope.get("sliding_attention") or {}
            if (kind := local.get("rope_type", "default")) != "default":
                raise ConfigError(f"{where}/config.json: rope_type={kind!r} with a window; only 'default' is known")
            settings["rope_local_base_freq"] = local.get("rope_theta", 10_000.0)
        if "rope_local_base_freq" in settings:
            settings["rope_local_base_freq"] = float(settings["rope_local_base_freq"])
        return settings


FAMILY = Gemma3Config
