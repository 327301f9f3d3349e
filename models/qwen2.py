"""Qwen2 and Qwen2.5: a Llama whose queries, keys and values have biases.

Source: Yang et al. 2024, "Qwen2 Technical Report"; Qwen Team 2024, "Qwen2.5 Technical Report".
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import Field, NonNegativeInt, PositiveInt

from pipekit.errors import ConfigError
from pipekit.models.decoder import DecoderFamily, decoder_sizes

_BASE = {"rotary_base": 1_000_000.0}


class WindowedFamily(DecoderFamily):
    """A decoder whose later blocks may attend only to a window."""

    sliding_window: PositiveInt | None = Field(default=None, examples=[4096])
    """Size of the attention window in tokens, including the token itself, in blocks from `first_window_layer` on; null
    attends to all earlier tokens."""

    first_window_layer: NonNegativeInt = Field(default=28, examples=[28])
    """The first block with a `sliding_window`."""

    def window_of(self, block: int) -> int | None:
        return self.sliding_window if block >= self.first_window_layer else None

    def hf_config(self, *, end_token_id: int | None, dtype: str) -> dict[str, Any]:
        return {
            **super().hf_config(end_token_id=end_token_id, dtype=dtype),
            "use_sliding_window": self.sliding_window is not None,
        }

    @classmethod
    def _settings_of(cls, stored: Mapping[str, Any], *, where: str) -> Mapping[str, Any]:
        window = stored.get("sliding_window") if stored.get("use_sliding_window") else None
        first, types = stored.get("max_window_layers", 28), stored.get("layer_types")
        if types is not None:
            known = ["sliding_attention" if window and i >= first else "full_attention" for i in range(len(types))]
            if list(types) != known:
                raise ConfigError(
                    f"{where}/config.json: layer_types={types!r}; only blocks from max_window_layers={first} on can "
                    "have windows"
                )
        return {**super()._settings_of(stored, where=where), "sliding_window": window}


class Qwen2Config(WindowedFamily):
    """Qwen2 model. A preset provides the sizes of a released model where they are not given.

    Example:
        >>> Qwen2Config(preset="qwen2.5-0.5b").attention_heads.num_kv_heads
        2
    """

    presets: ClassVar = {
        "qwen2.5-0.5b": decoder_sizes(
            151936, 896, 24, 14, 32768, 4864, **_BASE, num_kv_heads=2, tied_embedding=True, first_window_layer=24
        ),
        "qwen2.5-1.5b": decoder_sizes(
            151936, 1536, 28, 12, 131072, 8960, **_BASE, num_kv_heads=2, tied_embedding=True
        ),
        "qwen2.5-7b": decoder_sizes(152064, 3584, 28, 28, 131072, 18944, **_BASE, num_kv_heads=4),
    }  # fmt: skip
    hf_model_type: ClassVar = "qwen2"
    hf_class: ClassVar = "Qwen2ForCausalLM"
    hf_keys: ClassVar = {
        **{name: key for name, key in DecoderFamily.hf_keys.items() if name != "head_size"},
        "sliding_window": "sliding_window",
        "first_window_layer": "max_window_layers",
    }

    family: Literal["qwen2"] = "qwen2"
    """Architecture of the blocks."""

    preset: Literal["qwen2.5-0.5b", "qwen2.5-1.5b", "qwen2.5-7b"] | None = None
    """Named sizes; any size that you also give overrides it."""

    @property
    def has_qkv_bias(self) -> bool:
        return True


FAMILY = Qwen2Config
