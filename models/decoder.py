"""Base class of the families derived from Llama: RMS norms, rotary positions, grouped queries, a gated MLP."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from pipekit.models.family import (
    AttentionHeads,
    Epsilon,
    InitStd,
    LossChunk,
    TensorRename,
    TransformerFamily,
    Width,
    divisors,
    setting_error,
)
from pipekit.models.rotary_scaling import RotaryScaling, read_rope_parameters
from pipekit.settings.base import alternatives

if TYPE_CHECKING:
    from pipekit.layers.specs import LayerSpec


_POST_NORMS = {"attention.post_norm": "post_attention_layernorm", "mlp.post_norm": "post_feedforward_layernorm"}
_NORMS = {
    "before": {"attention.norm": "input_layernorm", "mlp.norm": "post_attention_layernorm"},
    "after": _POST_NORMS,
    "both": {"attention.norm": "input_layernorm", "mlp.norm": "pre_feedforward_layernorm", **_POST_NORMS},
}


class DecoderFamily(TransformerFamily):
    """A decoder like Llama. Subclasses override the properties and methods below to differ from it.

    Source: Touvron et al. 2023, "LLaMA: Open and Efficient Foundation Language Models".
    """

    hf_keys: ClassVar = {
        "vocab_size": "vocab_size",
        "hidden_size": "hidden_size",
        "num_layers": "num_hidden_layers",
        "num_heads": "num_attention_heads",
        "num_kv_heads": "num_key_value_heads",
        "head_size": "head_dim",
        "max_positions": "max_position_embeddings",
        "ffn_size": "intermediate_size",
        "dropout": "attention_dropout",
        "tied_embedding": "tie_word_embeddings",
        "rms_norm_eps": "rms_norm_eps",
        "init_std": "initializer_range",
    }
    hf_fixed: ClassVar = {"hidden_act": ("silu", "swish")}
    other_layers: ClassVar = 3

    num_kv_heads: PositiveInt | None = Field(default=None, examples=[2])
    """Number of key and value heads, each shared by `num_heads / num_kv_heads` query heads; null gives every query head
    its own."""

    head_size: Width | None = Field(default=None, examples=[64])
    """Width of a head; null means `hidden_size / num_heads`."""

    rotary_base: PositiveFloat = Field(default=10_000.0, examples=[500_000.0])
    """Base of the rotary wavelengths (RoPE theta)."""

    rotary_scaling: RotaryScaling | None = Field(default=None, examples=["{type: linear, factor: 2.0}"])
    """Longer rotary wavelengths: `type`, `factor` and the parameters of that type; null leaves them as they are."""

    tied_embedding: bool = False
    """The head shares the weight of the token embedding."""

    rms_norm_eps: Epsilon = 1e-6
    """Added to the mean square in every norm."""

    init_std: InitStd = 0.02
    """Standard deviation of the initial weights."""

    @property
    def has_qkv_bias(self) -> bool:
        """True if queries, keys and values have a bias."""
        return False

    @property
    def has_projection_bias(self) -> bool:
        """True if the last projection of attention has a bias."""
        return False

    @property
    def has_mlp_bias(self) -> bool:
        """True if the linear layers of an MLP have biases."""
        return False

    @property
    def qk_norm(self) -> Literal["head", "width"] | None:
        """Norms of queries and keys, of each head separately or over all heads; None if there are none."""
        return None

    def window_of(self, block: int) -> int | None:
        """Number of tokens that a token attends to in a block; None for all earlier tokens."""
        return None

    def rotary_of(self, block: int) -> tuple[float, RotaryScaling | None]:
        """Base and scaling of the rotary positions of a block."""
        return self.rotary_base, self.rotary_scaling

    @property
    def norm(self) -> Literal["rms", "offset_rms"]:
        """Type of all norms."""
        return "rms"

    @property
    def activation(self) -> Literal["silu", "gelu_tanh"]:
        """Activation function of an MLP's gate."""
        return "silu"

    @property
    def norm_place(self) -> Literal["before", "after", "both"]:
        """Position of the norms in a block: before attention and MLP, after them, or both."""
        return "before"

    @property
    def has_joint_projections(self) -> bool:
        """True if `transformers` has one tensor for queries, keys and values, and one for gate and expansion."""
        return False

    @property
    def rotary_size(self) -> int:
        """Dimensions of each head that are rotated."""
        return self.known_head_size

    @property
    def logit_cap(self) -> float | None:
        """Limit that the logits approach; None for no limit."""
        return None

    @property
    def attention_scale(self) -> float | None:
        """Factor of the attention scores; None for 1 over the square root of the width of a head."""
        return None

    @property
    def embedding_scale(self) -> float | None:
        """Factor of the token embeddings; None for 1."""
        return None

    @property
    def attention_heads(self) -> AttentionHeads:
        return AttentionHeads(self.num_heads, self.num_kv_heads or self.num_heads, joint=self.has_joint_projections)

    @property
    def known_head_size(self) -> int:
        """Width of a head."""
        return self.head_size or self.hidden_size // self.num_heads

    def layer_specs(self, *, loss_chunk_tokens: LossChunk = None) -> list[LayerSpec]:
        """Token embedding, two halves for each block, final norm, head."""
        from pipekit.layers.specs import LayerSpec
        from pipekit.models import transformer

        width, eps, std = self.hidden_size, self.rms_norm_eps, self.init_std
        embedding, head = transformer.embedding_and_head(
            self.known_vocab_size,
            width,
            loss_chunk_tokens,
            tied=self.tied_embedding,
            scale=self.embedding_scale,
            soft_cap=self.logit_cap,
            init_std=std,
        )
        # Two residual additions a block: their sum keeps its size at any depth.
        residual_std = std / math.sqrt(2 * self.num_layers)
        common: dict[str, Any] = {
            "norm": self.norm, "dropout": self.dropout, "eps": eps, "init_std": std, "residual_std": residual_std,
            **({} if self.norm_place == "before" else {"norm_place": self.norm_place}),
        }  # fmt: skip
        blocks = []
        for block in range(self.num_layers):
            rotary = transformer.Rotary(self.rotary_size, *self.rotary_of(block))
            attention = {"rotary": rotary, **self._attention_options(block), **common}
            mlp = {"activation": self.activation, "gated": True, "bias": self.has_mlp_bias, **common}
            name = f"blocks.{block}"
            blocks += [
                LayerSpec(transformer.AttentionHalf, width, self.num_heads, **attention, name=f"{name}.attention"),
                LayerSpec(transformer.MLPHalf, width, self.ffn_size, **mlp, name=f"{name}.mlp"),
            ]
        final_norm = LayerSpec(transformer.FINAL_NORMS[self.norm], width, eps=eps, name="final_norm")
        return [embedding, *blocks, final_norm, head]

    def _attention_options(self, block: int) -> dict[str, Any]:
        options = {
            "num_kv_heads": self.num_kv_heads,
            "head_size": self.head_size,
            "window": self.window_of(block),
            "scale": self.attention_scale,
            "qk_norm": self.qk_norm,
            "joint": self.has_joint_projections or None,
        }
        given = {name: value for name, value in options.items() if value is not None}
        return {"bias": self.has_qkv_bias, "projection_bias": self.has_projection_bias, **given, **self.sparse_options}

    def hf_config(self, *, end_token_id: int | None, dtype: str) -> dict[str, Any]:
        return {
            **super().hf_config(end_token_id=end_token_id, dtype=dtype),
            "num_key_value_heads": self.attention_heads.num_kv_heads,
            "head_dim": self.known_head_size,
            "rope_theta": self.rotary_base,
            "rope_scaling": None if self.rotary_scaling is None else self.rotary_scaling.to_hf(),
        }

    @classmethod
    def from_hf_config(cls, stored: Mapping[str, Any], *, where: str) -> TransformerFamily:
        stored = cls._settings_of(stored, where=where)
        base, scaling = read_rope_parameters(stored, where=where)
        model = super().from_hf_config(stored, where=where)
        changes = {"rotary_scaling": scaling} | ({} if base is None else {"rotary_base": float(base)})
        return cls.model_validate({**model.given(), **changes})

    @classmethod
    def _settings_of(cls, stored: Mapping[str, Any], *, where: str) -> Mapping[str, Any]:
        """Content of a `config.json`, in the form in which `hf_keys` reads it."""
        return {**stored, "attention_dropout": float(stored.get("attention_dropout", 0.0))}

    def hf_renames(self) -> list[TensorRename]:
        outside = {"embed.weight": "model.embed_tokens.weight", "final_norm.weight": "model.norm.weight"}
        renames = [TensorRename(ours, theirs) for ours, theirs in outside.items()]
        for block in range(self.num_layers):
            renames += self._hf_renames_of(f"blocks.{block}", f"model.layers.{block}")
        return renames if self.tied_embedding else [*renames, TensorRename("head.weight", "lm_head.weight")]

    def _hf_renames_of(self, ours: str, theirs: str) -> list[TensorRename]:
        heads, size, attention, mlp = self.attention_heads, self.known_head_size, f"{theirs}.self_attn", f"{theirs}.mlp"
        keys, values = (f"{attention}.{part}_proj" for part in "kv")
        kv_rows = {keys: heads.num_kv_heads * size, values: heads.num_kv_heads * size}
        q_rows = {f"{attention}.q_proj": heads.num_heads * size}
        packed = {"qkv": q_rows | kv_rows} if self.num_kv_heads is None else {"q": q_rows, "kv": kv_rows}
        names = dict(_NORMS[self.norm_place])
        if self.has_joint_projections:
            names |= {
                "attention.qkv": "self_attn.qkv_proj",
                "attention.projection": "self_attn.o_proj",
                "mlp.gate_and_up": "mlp.gate_up_proj",
                "mlp.contract": "mlp.down_proj",
            }
        renames = [TensorRename(f"{ours}.{name}.weight", f"{theirs}.{other}.weight") for name, other in names.items()]
        if self.has_joint_projections:
            return renames
        for kind in ("weight", "bias") if self.has_qkv_bias else ("weight",):
            for part, rows in packed.items():
                named = {f"{name}.{kind}": number for name, number in rows.items()}
                renames.append(TensorRename(f"{ours}.attention.{part}.{kind}", rows=named))
        for part in ("q_norm", "k_norm") if self.qk_norm else ():
            renames.append(TensorRename(f"{ours}.attention.{part}.weight", f"{attention}.{part}.weight"))
        for kind in ("weight", "bias") if self.has_projection_bias else ("weight",):
            renames.append(TensorRename(f"{ours}.attention.projection.{kind}", f"{attention}.o_proj.{kind}"))
        for kind in ("weight", "bias") if self.has_mlp_bias else ("weight",):
            gate_and_up = {f"{mlp}.{part}_proj.{kind}": self.ffn_size for part in ("gate", "up")}
            renames.append(TensorRename(f"{ours}.mlp.gate_and_up.{kind}", rows=gate_and_up))
            renames.append(TensorRename(f"{ours}.mlp.contract.{kind}", f"{mlp}.down_proj.{kind}"))
        return renames

    @model_validator(mode="before")
    @classmethod
    def _leave_out_what_follows(cls, values: Any) -> Any:
        """Write as many heads of keys as of queries, and heads as wide as they would be, as null."""
        if not isinstance(values, dict):
            return values
        filled = {**cls.presets.get(str(values.get("preset")), {}), **values}
        width, heads = filled.get("hidden_size"), filled.get("num_heads")
        if heads is not None and filled.get("num_kv_heads") == heads:
            values = {**values, "num_kv_heads": None}
        if type(width) is type(heads) is int and heads > 0 and filled.get("head_size") == width // heads:
            values = {**values, "head_size": None}
        return values

    @model_validator(mode="after")
    def _heads_fit(self) -> DecoderFamily:
        if self.num_kv_heads is not None and self.num_heads % self.num_kv_heads:
            text = f"model.num_kv_heads={self.num_kv_heads} does not divide model.num_heads={self.num_heads}"
            raise setting_error("num_kv_heads", f"{text}; try {alternatives(divisors(self.num_heads))}")
        if self.rotary_size % 2:
            text = f"model.head_size={self.known_head_size} is odd, and rotary positions turn pairs of dimensions"
            raise setting_error("head_size", f"{text}; make heads of an even size")
        return self


def decoder_sizes(
    vocab_size: int, hidden_size: int, num_layers: int, num_heads: int, max_positions: int, ffn_size: int, **more: Any
) -> dict[str, Any]:
    """Settings of a preset."""
    sizes = {"vocab_size": vocab_size, "hidden_size": hidden_size, "num_layers": num_layers, "num_heads": num_heads}
    return {**sizes, "max_positions": max_positions, "ffn_size": ffn_size, **more}
