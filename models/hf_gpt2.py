"""GPT-2 between our names and those of Hugging Face `transformers`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError
from torch import Tensor

from pipekit.config import GPTConfig
from pipekit.errors import CheckpointError, ConfigError

_KNOWN: dict[str, tuple[Any, ...]] = {
    "model_type": ("gpt2",),
    "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "add_cross_attention": (False,),
}
"""Settings that change what GPT-2 computes, with the values that these layers compute; the default first."""


@dataclass(frozen=True)
class TensorRename:
    """One tensor under both names.

    Attributes:
        ours: logical name.
        theirs: name in `GPT2LMHeadModel`.
        transpose: whether theirs is `(in, out)` where ours is `(out, in)`: their Conv1D.
    """

    ours: str
    theirs: str
    transpose: bool = False


def plan_renames(config: GPTConfig) -> list[TensorRename]:
    """Return every tensor's two names."""
    renames = [
        TensorRename("embed.weight", "transformer.wte.weight"),
        TensorRename("position.weight", "transformer.wpe.weight"),
        TensorRename("final_norm.weight", "transformer.ln_f.weight"),
        TensorRename("final_norm.bias", "transformer.ln_f.bias"),
    ]
    if not config.tied_embedding:
        renames.append(TensorRename("head.weight", "lm_head.weight"))
    halves = {
        "attention.norm": "ln_1",
        "attention.qkv": "attn.c_attn",
        "attention.projection": "attn.c_proj",
        "mlp.norm": "ln_2",
        "mlp.expand": "mlp.c_fc",
        "mlp.contract": "mlp.c_proj",
    }
    for block in range(config.num_layers):
        for ours, theirs in halves.items():
            our_name, their_name = f"blocks.{block}.{ours}", f"transformer.h.{block}.{theirs}"
            transpose = not ours.endswith("norm")
            renames.append(TensorRename(f"{our_name}.weight", f"{their_name}.weight", transpose))
            renames.append(TensorRename(f"{our_name}.bias", f"{their_name}.bias"))
    return renames


def to_hf(config: GPTConfig, tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Yield each tensor under their name and in their orientation."""
    for rename in plan_renames(config):
        tensor = tensors[rename.ours]
        yield rename.theirs, tensor.T.contiguous() if rename.transpose else tensor


def from_hf(config: GPTConfig, tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Yield each tensor under our name and in our orientation.

    The names may lack `transformer.` in front, as in the released GPT-2 files, which hold the bare
    `GPT2Model`.

    Raises:
        CheckpointError: if a tensor is missing.
    """
    for rename in plan_renames(config):
        bare = rename.theirs.removeprefix("transformer.")
        theirs = rename.theirs if rename.theirs in tensors else bare
        if theirs not in tensors:
            raise CheckpointError(f"{rename.theirs} is missing: the file does not hold the GPT-2 of its config.json")
        tensor = tensors[theirs]
        yield rename.ours, tensor.T.contiguous() if rename.transpose else tensor


def plan_hf_config(config: GPTConfig, *, end_token_id: int | None, dtype: str) -> dict[str, Any]:
    """Return `config.json` of the exported model.

    Args:
        config: the model.
        end_token_id: id of the token that ends a document; None where the model was not trained on text.
        dtype: of the exported tensors, such as `float32`.
    """
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "vocab_size": config.vocab_size,
        "n_positions": config.max_positions,
        "n_ctx": config.max_positions,
        "n_embd": config.hidden_size,
        "n_layer": config.num_layers,
        "n_head": config.num_heads,
        "n_inner": config.ffn_size,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": config.layer_norm_eps,
        "initializer_range": config.init_std,
        "attn_pdrop": config.dropout,
        "embd_pdrop": config.dropout,
        "resid_pdrop": config.dropout,
        "tie_word_embeddings": config.tied_embedding,
        "bos_token_id": end_token_id,
        "eos_token_id": end_token_id,
        "torch_dtype": dtype,
        "use_cache": True,
    }


def read_hf_config(stored: Mapping[str, Any], *, where: str) -> GPTConfig:
    """Return the model that a `config.json` describes.

    Raises:
        ConfigError: if it is no GPT-2 that these layers compute.
    """
    for key, values in _KNOWN.items():
        if stored.get(key, values[0]) not in values:
            known = " or ".join(map(repr, values))
            raise ConfigError(f"{where}/config.json: {key}={stored[key]!r}; only {known} is known")
    sizes = ("vocab_size", "n_embd", "n_layer", "n_head", "n_positions")
    if missing := [key for key in sizes if key not in stored]:
        raise ConfigError(f"{where}/config.json: has no {', '.join(missing)}; it describes no GPT-2")
    settings: dict[str, Any] = {
        "vocab_size": stored["vocab_size"],
        "hidden_size": stored["n_embd"],
        "num_layers": stored["n_layer"],
        "num_heads": stored["n_head"],
        "ffn_size": stored.get("n_inner"),
        "max_positions": stored["n_positions"],
        "dropout": stored.get("resid_pdrop", 0.0),
        "tied_embedding": stored.get("tie_word_embeddings", True),
        "layer_norm_eps": stored.get("layer_norm_epsilon", 1e-5),
        "init_std": stored.get("initializer_range", 0.02),
    }
    try:
        return GPTConfig(**settings)
    except ValidationError as error:
        faults = "; ".join(
            f"{'.'.join(map(str, fault['loc']))}{': ' if fault['loc'] else ''}{fault['msg']}"
            for fault in error.errors()
        )
        raise ConfigError(f"{where}/config.json: describes no GPT-2: {faults}") from None
