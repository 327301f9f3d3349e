"""The model section: a GPT of a built-in family, or the user's own list of layer specs."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt, field_validator, model_validator
from pydantic_core import PydanticCustomError

from pipekit.settings.base import Section, alternatives

PresetName = Literal["tiny", "mini", "gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"]


def _gpt2(hidden_size: int, num_layers: int, num_heads: int) -> dict[str, int | str]:
    return {
        "vocab_size": 50257,
        "hidden_size": hidden_size,
        "num_layers": num_layers,
        "num_heads": num_heads,
        "max_positions": 1024,
    }


PRESETS: dict[PresetName, dict[str, int | str]] = {
    "tiny": {"vocab_size": "auto", "hidden_size": 128, "num_layers": 4, "num_heads": 4, "max_positions": 256},
    "mini": {"vocab_size": "auto", "hidden_size": 256, "num_layers": 6, "num_heads": 8, "max_positions": 512},
    "gpt2": _gpt2(768, 12, 12),
    "gpt2-medium": _gpt2(1024, 24, 16),
    "gpt2-large": _gpt2(1280, 36, 20),
    "gpt2-xl": _gpt2(1600, 48, 25),
}
"""The sizes that each preset stands for. The `gpt2` ones are the released GPT-2 models."""


class GPTConfig(Section):
    """A GPT of a built-in family. A preset fills the sizes that are not given, so that all are present.

    Example:
        >>> GPTConfig(preset="tiny", num_layers=2).ffn_size
        512
    """

    family: Literal["gpt2"] = "gpt2"
    """Architecture of the blocks."""

    preset: PresetName | None = None
    """Named sizes; any size given beside it takes precedence."""

    vocab_size: PositiveInt | Literal["auto"] = Field(default="auto", examples=[50257])
    """Number of token ids that the model knows; `auto` takes that of the tokenizer."""

    hidden_size: PositiveInt = Field(default=..., examples=[128])
    """Width of the residual stream; a multiple of `num_heads`."""

    num_layers: PositiveInt = Field(default=..., examples=[4])
    """Number of transformer blocks."""

    num_heads: PositiveInt = Field(default=..., examples=[4])
    """Attention heads per block; divides `hidden_size`."""

    num_kv_heads: PositiveInt | None = Field(default=None, examples=[2])
    """Heads of keys and values, each of which `num_heads / num_kv_heads` heads of queries share; null gives every head
    its own."""

    ffn_size: PositiveInt = Field(default=..., examples=[512])
    """Width inside the feed-forward half of a block; 4 x `hidden_size` where it is not given."""

    max_positions: PositiveInt = Field(default=..., examples=[256])
    """Longest sequence in tokens; `train.sequence_length` may not exceed it."""

    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Probability of zeroing an activation during training."""

    tied_embedding: bool = True
    """Whether the head shares the weight of the token embedding."""

    layer_norm_eps: PositiveFloat = 1e-5
    """Added to the variance in every layer norm."""

    init_std: NonNegativeFloat = 0.02
    """Standard deviation of the initial weights."""

    @property
    def num_layer_specs(self) -> int:
        """The number of layers to partition: two per block, two embeddings, the final norm and the head."""
        return 2 * self.num_layers + 4

    def with_vocab_size(self, vocab_size: int) -> GPTConfig:
        """Return a copy whose vocabulary size is a number."""
        return self.model_copy(update={"vocab_size": vocab_size})

    def given(self) -> dict[str, Any]:
        """Return the settings without those that follow from the preset, the width or the defaults.

        Example:
            >>> GPTConfig(preset="tiny", num_layers=2).given()
            {'preset': 'tiny', 'num_layers': 2}
        """
        derived: dict[str, Any] = {name: field.default for name, field in type(self).model_fields.items()}
        derived |= {"ffn_size": 4 * self.hidden_size, **(PRESETS[self.preset] if self.preset else {})}
        return {name: value for name, value in self.model_dump().items() if value != derived[name]}

    @model_validator(mode="before")
    @classmethod
    def _fill_sizes(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        preset = values.get("preset")
        filled = {**(PRESETS.get(preset, {}) if isinstance(preset, str) else {}), **values}  # type: ignore[call-overload]
        if filled.get("ffn_size") is None:
            hidden_size = filled.get("hidden_size")
            # Where the width itself is at fault, only the width is reported.
            filled["ffn_size"] = 4 * hidden_size if type(hidden_size) is int and hidden_size > 0 else 1
        return filled

    @model_validator(mode="after")
    def _heads_divide_width(self) -> GPTConfig:
        if self.hidden_size % self.num_heads:
            divisors = [n for n in range(1, self.hidden_size + 1) if self.hidden_size % n == 0]
            near = [n for n in divisors if n < self.num_heads][-3:] + [n for n in divisors if n > self.num_heads][:1]
            text = f"model.num_heads={self.num_heads} does not divide model.hidden_size={self.hidden_size}"
            text += f"; try {alternatives(near)}"
            raise PydanticCustomError("rule", "{text}", {"key": "num_heads", "text": text})
        if self.num_kv_heads is not None and self.num_heads % self.num_kv_heads:
            divisors = [n for n in range(1, self.num_heads + 1) if self.num_heads % n == 0]
            text = f"model.num_kv_heads={self.num_kv_heads} does not divide model.num_heads={self.num_heads}"
            text += f"; try {alternatives(divisors)}"
            raise PydanticCustomError("rule", "{text}", {"key": "num_kv_heads", "text": text})
        return self


class CustomModelConfig(Section):
    """The user's own model: a function that returns a list of layer specs."""

    builder: str = Field(examples=["my_package.my_model:build_layers"])
    """`package.module:function`; called as `function(config)`, it returns a list of `LayerSpec`."""

    args: dict[str, Any] = Field(default={}, examples=[{"width": 64}])
    """Anything that the function wants to read, as `config.model.args`."""

    @property
    def num_layer_specs(self) -> None:
        """Not known before the function is called."""
        return None

    @model_validator(mode="before")
    @classmethod
    def _from_string(cls, values: Any) -> Any:
        return {"builder": values} if isinstance(values, str) else values

    @field_validator("builder")
    @classmethod
    def _names_a_function(cls, builder: str) -> str:
        if not re.fullmatch(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*(\.[A-Za-z_]\w*)*", builder):
            raise ValueError(
                "must name a function as package.module:function; for example builder: my_package.my_model:build_layers"
            )
        return builder


ModelConfig = GPTConfig | CustomModelConfig


def model_class_of(values: object) -> type[GPTConfig] | type[CustomModelConfig] | None:
    """Return the class that reads the model section: text, or a mapping with `builder`, is the user's own."""
    if isinstance(values, (GPTConfig, CustomModelConfig)):
        return type(values)
    if isinstance(values, str):
        return CustomModelConfig
    if isinstance(values, dict):
        return CustomModelConfig if {"builder", "args"} & set(values) else GPTConfig
    return None
