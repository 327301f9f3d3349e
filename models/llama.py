"""Llama 1 to 3.x: RMS norms, rotary positions, SwiGLU, and grouped queries from Llama 2 70B on.

Source: Touvron et al. 2023, "LLaMA: Open and Efficient Foundation Language Models"; Llama Team 2024, "The Llama 3 Herd
of Models".
"""

from __future__ import annotations

from typing import ClassVar, Literal

from pipekit.models.decoder import DecoderFamily, decoder_sizes

_LLAMA_3 = {"num_kv_heads": 8, "rotary_base": 500_000.0, "rms_norm_eps": 1e-5}


def _scaling(factor: float) -> dict[str, object]:
    return {
        "type": "llama3",
        "factor": factor,
        "original_max_positions": 8192,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
    }


class LlamaConfig(DecoderFamily):
    """Llama model. A preset provides the sizes of a released model where they are not given.

    Example:
        >>> LlamaConfig(preset="llama-3.2-1b").num_layer_specs
        35
    """

    presets: ClassVar = {
        "llama-7b": decoder_sizes(32000, 4096, 32, 32, 2048, 11008),
        "llama-2-7b": decoder_sizes(32000, 4096, 32, 32, 4096, 11008, rms_norm_eps=1e-5),
        "llama-2-70b": decoder_sizes(32000, 8192, 80, 64, 4096, 28672, num_kv_heads=8, rms_norm_eps=1e-5),
        "llama-3-8b": decoder_sizes(128256, 4096, 32, 32, 8192, 14336, **_LLAMA_3),
        "llama-3.1-8b": decoder_sizes(
            128256, 4096, 32, 32, 131072, 14336, **_LLAMA_3, rotary_scaling=_scaling(8.0)
        ),
        "llama-3.1-70b": decoder_sizes(
            128256, 8192, 80, 64, 131072, 28672, **_LLAMA_3, rotary_scaling=_scaling(8.0)
        ),
        "llama-3.2-1b": decoder_sizes(
            128256, 2048, 16, 32, 131072, 8192, **_LLAMA_3, rotary_scaling=_scaling(32.0), tied_embedding=True
        ),
        "llama-3.2-3b": decoder_sizes(
            128256, 3072, 28, 24, 131072, 8192, **_LLAMA_3, rotary_scaling=_scaling(32.0), tied_embedding=True
        ),
    }  # fmt: skip
    hf_model_type: ClassVar = "llama"
    hf_class: ClassVar = "LlamaForCausalLM"
    hf_keys: ClassVar = {**DecoderFamily.hf_keys, "attention_bias": "attention_bias", "mlp_bias": "mlp_bias"}
    hf_fixed: ClassVar = {**DecoderFamily.hf_fixed, "pretraining_tp": (1,)}

    family: Literal["llama"] = "llama"
    """Architecture of the blocks."""

    preset: (
        Literal[
            "llama-7b",
            "llama-2-7b",
            "llama-2-70b",
            "llama-3-8b",
            "llama-3.1-8b",
            "llama-3.1-70b",
            "llama-3.2-1b",
            "llama-3.2-3b",
        ]
        | None
    ) = None
    """Named sizes; any size that you also give overrides it."""

    attention_bias: bool = False
    """The linear layers of attention have biases."""

    mlp_bias: bool = False
    """The linear layers of an MLP have biases."""

    @property
    def has_qkv_bias(self) -> bool:
        return self.attention_bias

    @property
    def has_projection_bias(self) -> bool:
        return self.attention_bias

    @property
    def has_mlp_bias(self) -> bool:
        return self.mlp_bias


FAMILY = LlamaConfig
