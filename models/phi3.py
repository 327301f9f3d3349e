"""Phi 3 and 4: one projection for queries, keys and values, one for gate and expansion, a part of each head rotated.

Source: Abdin et al. 2024, "Phi-3 Technical Report"; "Phi-4 Technical Report".
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, PositiveInt

from pipekit.models.decoder import DecoderFamily, decoder_sizes
from pipekit.models.family import Epsilon


class Phi3Config(DecoderFamily):
    """Phi 3 or Phi 4 model. A preset provides the sizes of a released model where they are not given.

    Example:
        >>> Phi3Config(preset="phi-3-mini-4k").num_layer_specs
        67
    """

    presets: ClassVar = {
        "phi-3-mini-4k": decoder_sizes(32064, 3072, 32, 32, 4096, 8192, sliding_window=2047),
        "phi-4": decoder_sizes(100352, 5120, 40, 40, 16384, 17920, num_kv_heads=10, rotary_base=250_000.0),
    }
    hf_model_type: ClassVar = "phi3"
    hf_class: ClassVar = "Phi3ForCausalLM"
    hf_keys: ClassVar = {
        **DecoderFamily.hf_keys,
        "rotary_pct": "partial_rotary_factor",
        "sliding_window": "sliding_window",
    }

    family: Literal["phi3"] = "phi3"
    """Architecture of the blocks."""

    preset: Literal["phi-3-mini-4k", "phi-4"] | None = None
    """Named sizes; any size that you also give overrides it."""

    rms_norm_eps: Epsilon = 1e-5
    """Added to the mean square in every norm."""

    rotary_pct: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Fraction of each head's dimensions that have rotary positions."""

    sliding_window: PositiveInt | None = Field(default=None, examples=[2047])
    """Size of the attention window in tokens, including the token itself; null attends to all earlier tokens."""

    @property
    def has_joint_projections(self) -> bool:
        return True

    @property
    def rotary_size(self) -> int:
        return int(self.known_head_size * self.rotary_pct)

    def window_of(self, block: int) -> int | None:
        return self.sliding_window

    def hf_config(self, *, end_token_id: int | None, dtype: str) -> dict[str, Any]:
        stored = super().hf_config(end_token_id=end_token_id, dtype=dtype)
        stored |= {
            "resid_pdrop": self.dropout,
            "embd_pdrop": 0.0,
            "original_max_position_embeddings": self.max_positions,
        }
        # Their token for padding need not be in a small vocabulary.
        stored |= {"pad_token_id": end_token_id}
        if (scaling := self.rotary_scaling) is not None:
            # transformers 4 takes no other keys than these.
            original = scaling.original_max_positions or self.max_positions
            names = {"rope_type": "type", "short_factor": "short_factor", "long_factor": "long_factor"}
            names |= {"attention_factor": "attention_factor"}
            names |= {} if scaling.factor == self.max_positions / original else {"factor": "factor"}
            stored["rope_scaling"] = {names[key]: value for key, value in scaling.to_hf().items() if key in names}
            stored["original_max_position_embeddings"] = original
        return stored

    @classmethod
    def _settings_of(cls, stored: Mapping[str, Any], *, where: str) -> Mapping[str, Any]:
        rope = dict(stored.get("rope_parameters") or {})
        fraction = rope.pop("partial_rotary_factor", None) or stored.get("partial_rotary_factor", 1.0)
        settings = super()._settings_of(stored, where=where)
        return {**settings, "rope_parameters": rope, "partial_rotary_factor": float(fraction)}


FAMILY = Phi3Config
