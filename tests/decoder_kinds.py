"""Settings of small decoders of every family, in all the ways in which they differ."""

from __future__ import annotations

from typing import Any

LLAMA_3 = {
    "type": "llama3",
    "factor": 4.0,
    "original_max_positions": 6,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
}
LONG = {"type": "longrope", "short_factor": (1.0, 1.5), "long_factor": (2.0, 3.0)}
YARN = {"type": "yarn", "factor": 2.0, "original_max_positions": 6}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama, grouped, tied": ("llama", {"num_kv_heads": 2, "tied_embedding": True, "rotary_base": 500.0}),
    "llama, biases": ("llama", {"attention_bias": True, "mlp_bias": True, "num_kv_heads": 1}),
    "llama, wide heads": ("llama", {"head_size": 6, "num_kv_heads": 2}),
    "llama, llama3": ("llama", {"rotary_scaling": LLAMA_3}),
    "llama, linear": ("llama", {"rotary_scaling": {"type": "linear", "factor": 3.0}}),
    "llama, dynamic": ("llama", {"rotary_scaling": {"type": "dynamic", "factor": 3.0}}),
    "llama, yarn": ("llama", {"rotary_scaling": YARN}),
    "llama, yarn in detail": (
        "llama",
        {"rotary_scaling": {**YARN, "beta_fast": 2.0, "mscale": 2.0, "mscale_all_dim": 0.5, "truncate": False}},
    ),
    "mistral": ("mistral", {"num_kv_heads": 2}),
    "mistral, window": ("mistral", {"num_kv_heads": 2, "sliding_window": 3, "head_size": 4}),
    "qwen2": ("qwen2", {"num_kv_heads": 2, "tied_embedding": True}),
    "qwen2, window": ("qwen2", {"sliding_window": 3, "first_window_layer": 1}),
    "qwen3": ("qwen3", {"num_kv_heads": 2, "head_size": 16, "tied_embedding": True}),
    "gemma2": (
        "gemma2",
        {
            "num_kv_heads": 2,
            "head_size": 12,
            "query_size": 3,
            "sliding_window": 3,
            "attention_soft_cap": 2.0,
            "final_soft_cap": 1.0,
        },
    ),
    "gemma2, biases, no caps": (
        "gemma2",
        {
            "head_size": None,
            "attention_bias": True,
            "tied_embedding": False,
            "attention_soft_cap": None,
            "final_soft_cap": None,
        },
    ),
    "olmo2": ("olmo2", {}),
    "olmo2, grouped, tied, biases": ("olmo2", {"num_kv_heads": 2, "tied_embedding": True, "attention_bias": True}),
    "phi3": ("phi3", {"sliding_window": 3}),
    "phi3, grouped, tied, half": ("phi3", {"num_kv_heads": 2, "tied_embedding": True, "rotary_pct": 0.5}),
    "phi3, longrope": (
        "phi3",
        {"rotary_pct": 0.5, "rotary_scaling": {**LONG, "factor": 2.0, "original_max_positions": 6}},
    ),
    "phi3, longrope, short": (
        "phi3",
        {"rotary_pct": 0.5, "rotary_scaling": {**LONG, "factor": 1.5, "original_max_positions": 10}},
    ),
    "gemma3": ("gemma3", {"num_kv_heads": 2, "head_size": 16, "sliding_window": 3, "global_every": 2}),
    "gemma3, scaled, untied": (
        "gemma3",
        {
            "head_size": None,
            "sliding_window": 5,
            "global_every": 2,
            "query_size": 7,
            "tied_embedding": False,
            "rotary_scaling": {"type": "linear", "factor": 8.0},
        },
    ),
    "qwen3, biases, window": ("qwen3", {"attention_bias": True, "sliding_window": 4, "first_window_layer": 0}),
}
