"""Base classes of model families: a family's configuration, and everything else that is specific to it.

Each family is one file in this folder, which assigns its class to `FAMILY`. No other code names the family. The file
imports torch only inside functions, so that reading a configuration does not load it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import ConfigDict, Field, NonNegativeFloat, PositiveFloat, PositiveInt, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from pipekit.errors import ConfigError
from pipekit.models.sparsity import BlockLayouts, SparseAttention
from pipekit.settings.base import Fault, PathText, Section, alternatives, at_least, at_most, rule_fault

if TYPE_CHECKING:
    from pipekit.config import Config
    from pipekit.layers.specs import LayerSpec

LONGEST_SEQUENCE = "the longest sequences in use have a tenth of that"

Width = Annotated[PositiveInt, at_most(2**24, "the widest layers in use have a hundredth of that")]

Epsilon = Annotated[PositiveFloat, at_most(1, "it is to be small beside a variance")]

InitStd = Annotated[
    NonNegativeFloat,
    at_least(1e-12, "weights that are all alike stay alike, and learn nothing"),
    at_most(100, "the first loss would not be finite"),
]

LossChunk = int | Literal["auto"] | None
"""Number of tokens per chunk of the loss; see `pipekit.models.transformer.head.score_vocabulary`."""


@dataclass(frozen=True)
class AttentionHeads:
    """Numbers of heads of an attention layer, of queries and of keys and values; each rank computes whole heads.

    If all are `joint` in one projection, no two tensor-parallel ranks can have the same head of keys and values.
    """

    num_heads: int
    num_kv_heads: int
    joint: bool = False

    def fault(self, tp: int) -> Fault | None:
        """Fault of a tensor-parallel degree that cannot divide the heads; None if it can.

        Example:
            >>> AttentionHeads(12, 12).fault(4)
            >>> AttentionHeads(3, 3).fault(2).message
            'parallel.tp=2 does not divide model.num_heads=3, and a rank computes whole heads; try parallel.tp=1'
        """
        if self._fit(tp):
            return None
        key, rule = "num_kv_heads", f"and model.num_kv_heads={self.num_kv_heads}: one must divide the other"
        if self.joint:
            rule = f"does not divide model.num_kv_heads={self.num_kv_heads}"
        if self.num_heads % tp:
            key = "num_heads"
            rule = f"does not divide model.num_heads={self.num_heads}, and a rank computes whole heads"
        remedy = f"try parallel.tp={alternatives([n for n in range(1, tp) if self._fit(n)][-3:])}"
        return rule_fault(f"parallel.tp model.{key}", f"parallel.tp={tp} {rule}; {remedy}")

    def _fit(self, tp: int) -> bool:
        shared = self.num_kv_heads % tp == 0 or (tp % self.num_kv_heads == 0 and not self.joint)
        return self.num_heads % tp == 0 and shared


@dataclass(frozen=True)
class TensorRename:
    """One tensor under its logical name and under its name in Hugging Face `transformers`.

    Attributes:
        ours: logical name.
        theirs: name in `transformers`; unused if `rows` is given.
        pattern: pattern of `einops.rearrange`, from our tensor to theirs; None if the elements have the same order.
        sizes: lengths of the axes that the pattern splits.
        rows: name and number of rows of each tensor in `transformers`, if our tensor stacks several of theirs.
    """

    ours: str
    theirs: str = ""
    pattern: str | None = None
    sizes: Mapping[str, int] = field(default_factory=dict)
    rows: Mapping[str, int] = field(default_factory=dict)

    @property
    def names(self) -> tuple[str, ...]:
        """All names of the tensor in `transformers`."""
        return tuple(self.rows) or (self.theirs,)


class ModelFamily(Section):
    """Base class of model families: the `model` section of a configuration.

    The defaults here suit a model about which nothing is known before it is built.
    """

    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    """Settings of each preset. The names of presets are unique among all families, and so imply the family."""

    loss_computes_logits: ClassVar[bool] = False
    """True if the loss computes the logits, and so reads the weights of the head."""

    @property
    def description(self) -> str:
        """The model in a few words, for the console."""
        raise NotImplementedError

    @property
    def num_layer_specs(self) -> int | None:
        """Number of layer specs to partition; None if it is not known before the model is built."""
        return None

    @property
    def layer_count(self) -> str:
        """`num_layer_specs` as a sum of settings, for messages."""
        return ""

    @property
    def attention_heads(self) -> AttentionHeads | None:
        """Attention heads that are sharded over tensor-parallel ranks; None if they are not known."""
        return None

    @property
    def longest_sequence(self) -> int | None:
        """Longest sequence in tokens; None if it is not known."""
        return None

    @property
    def needs_data(self) -> bool:
        """True if the sizes of the layers may follow from the data."""
        return True

    @property
    def dropouts(self) -> dict[str, float]:
        """Dropout probabilities that are not 0, by dotted key."""
        return {}

    def given(self) -> dict[str, Any]:
        """Settings, without those that follow from others."""
        return self.model_dump()

    def fit_vocabulary(self, num_tokens: int, *, tokenizer: object) -> dict[str, Any]:
        """Changes for a tokenizer, by dotted key; raises a ConfigError if the vocabulary is too small for it."""
        return {}

    def build_layers(self, config: Config) -> list[LayerSpec]:
        """Layer specs of a run's model; raises a ConfigError if the model cannot be built."""
        raise NotImplementedError

    def no_export_reason(self) -> str | None:
        """Reason why `transformers` cannot read this model, as a clause; None if it can."""
        return None


class TransformerFamily(ModelFamily):
    """A decoder-only transformer of a built-in family. A preset provides the sizes that are not given.

    The class attributes are the family's names, here and in `transformers`.
    """

    model_config = ConfigDict(json_schema_extra=lambda schema: schema.pop("required", None))  # a preset supplies them

    loss_computes_logits: ClassVar = True

    hf_model_type: ClassVar[str]
    """`model_type` of its `config.json`."""

    hf_class: ClassVar[str]
    """Class of `transformers` that reads it."""

    hf_keys: ClassVar[Mapping[str, str]]
    """Keys of its `config.json` by the setting that each holds."""

    hf_fixed: ClassVar[Mapping[str, tuple[Any, ...]]]
    """Keys of its `config.json` that change what the model computes, with the values that are supported here. The first
    value is written, and is the meaning of a missing key."""

    other_layers: ClassVar[int]
    """Number of layers before and after the blocks."""

    family: str
    """Architecture of the blocks."""

    preset: str | None = None
    """Named sizes; any size that you also give overrides it."""

    vocab_size: Width | Literal["auto"] = Field(default="auto", examples=[50257])
    """Vocabulary size: the number of token ids; `auto` takes the tokenizer's number."""

    hidden_size: Width = Field(default=..., examples=[128])
    """Width of the residual stream; a multiple of `num_heads`."""

    num_layers: Annotated[PositiveInt, at_most(10_000, "the deepest models trained have a tenth of that")] = Field(
        default=..., examples=[4]
    )
    """Number of transformer blocks."""

    num_heads: PositiveInt = Field(default=..., examples=[4])
    """Attention heads per block; divides `hidden_size`."""

    ffn_size: Width = Field(default=..., examples=[512], json_schema_extra={"type": ["integer", "null"]})
    """Width inside the feed-forward half of a block; default 4 x `hidden_size`."""

    max_positions: Annotated[PositiveInt, at_most(10**8, LONGEST_SEQUENCE)] = Field(default=..., examples=[256])
    """Longest sequence in tokens; `train.sequence_length` may not exceed it."""

    dropout: Annotated[float, Field(ge=0, lt=1), at_most(0.95, "too little is left to learn from")] = 0.0
    """Probability of zeroing an activation during training."""

    sparse_attention: SparseAttention | None = Field(default=None, examples=[{"mode": "fixed", "block": 64}])
    """Let each token attend to only some of those before it: a `mode` and its parameters; null attends to all of
    them."""

    init_from: PathText | None = Field(default=None, min_length=1, examples=["downloads/gpt2"])
    """Folder of a Hugging Face model whose weights the training starts from; `family: auto` takes its sizes too."""

    export_vocab_size: PositiveInt | None = Field(default=None, examples=[50257])
    """Number of token ids to keep in an export, if `vocab_size` has been padded; null keeps all."""

    def layer_specs(self, *, loss_chunk_tokens: LossChunk = None) -> list[LayerSpec]:
        """Layer specs of the model; raises a ConfigError if the vocabulary size is not known yet."""
        raise NotImplementedError

    def hf_renames(self) -> list[TensorRename]:
        """Both names of every tensor."""
        raise NotImplementedError

    def hf_config(self, *, end_token_id: int | None, dtype: str) -> dict[str, Any]:
        """Content of `config.json`; `end_token_id` is None if the model was not trained on text."""
        return {
            "architectures": [self.hf_class],
            "model_type": self.hf_model_type,
            **{key: values[0] for key, values in self.hf_fixed.items()},
            **{key: getattr(self, name) for name, key in self.hf_keys.items()},
            "bos_token_id": end_token_id,
            "eos_token_id": end_token_id,
            "torch_dtype": dtype,
            "use_cache": True,
        }

    @classmethod
    def from_hf_config(cls, stored: Mapping[str, Any], *, where: str) -> TransformerFamily:
        """Model that a `config.json` describes; raises a ConfigError if these layers cannot compute it."""
        for key, values in cls.hf_fixed.items():
            if stored.get(key, values[0]) not in values:
                known = " or ".join(map(repr, values))
                raise ConfigError(f"{where}/config.json: {key}={stored[key]!r}; only {known} is known")
        required = [name for name, info in cls.model_fields.items() if info.is_required() and name in cls.hf_keys]
        keys = [cls.hf_keys[name] for name in ["vocab_size", *required] if name != "ffn_size"]
        if missing := [key for key in keys if key not in stored]:
            raise ConfigError(f"{where}/config.json: has no {', '.join(missing)}, and describes no {cls.hf_class}")
        try:
            return cls(**{name: stored[key] for name, key in cls.hf_keys.items() if key in stored})
        except ValidationError as error:
            faults = [": ".join([*map(str, fault["loc"]), fault["msg"]]) for fault in error.errors()]
            raise ConfigError(f"{where}/config.json: describes no {cls.hf_class}: {'; '.join(faults)}") from None

    @property
    def description(self) -> str:
        return self.preset or f"{self.family} {self.hidden_size} wide"

    @property
    def layers_per_block(self) -> int:
        """Number of layers per block."""
        return 2

    @property
    def num_layer_specs(self) -> int:
        return self.layers_per_block * self.num_layers + self.other_layers

    @property
    def layer_count(self) -> str:
        return f"{self.layers_per_block} for each of model.num_layers={self.num_layers}, and {self.other_layers} more"

    @property
    def attention_heads(self) -> AttentionHeads:
        return AttentionHeads(self.num_heads, self.num_heads)

    @property
    def longest_sequence(self) -> int:
        return self.max_positions

    @property
    def needs_data(self) -> bool:
        return self.vocab_size == "auto"

    @property
    def dropouts(self) -> dict[str, float]:
        return {"model.dropout": self.dropout} if self.dropout else {}

    @property
    def known_vocab_size(self) -> int:
        """`vocab_size` as a number; raises a ConfigError if it is `auto`."""
        if self.vocab_size == "auto":
            raise ConfigError(
                "model.vocab_size=auto: the size is the tokenizer's, and none has been read yet; give a number"
            )
        return self.vocab_size

    @property
    def sparse_options(self) -> dict[str, Any]:
        """Arguments of an attention layer for the setting `sparse_attention`."""
        settings = self.sparse_attention
        if settings is None:
            return {}
        if settings.mode == "sliding_window":
            return {"window": settings.window}
        return {"layouts": BlockLayouts(settings, self.num_heads, self.max_positions)}

    def no_export_reason(self) -> str | None:
        if self.sparse_attention is None:
            return None
        return (
            f"has model.sparse_attention.mode={self.sparse_attention.mode}, and {self.hf_class} knows no such attention"
        )

    def given(self) -> dict[str, Any]:
        """Settings, without those that follow from the preset (which implies the family), the width or the defaults."""
        derived: dict[str, Any] = {name: info.default for name, info in type(self).model_fields.items()}
        derived |= {"ffn_size": 4 * self.hidden_size}
        derived |= self.presets[self.preset] if self.preset else {"family": None}
        return {name: value for name, value in self.model_dump().items() if value != derived[name]}

    def fit_vocabulary(self, num_tokens: int, *, tokenizer: object) -> dict[str, Any]:
        if self.vocab_size == "auto":
            return {"model.vocab_size": num_tokens}
        if self.vocab_size < num_tokens:
            raise ConfigError(
                f"model.vocab_size={self.vocab_size} is smaller than the tokenizer's {num_tokens} tokens "
                f"({tokenizer}), and every token needs a row; try model.vocab_size={num_tokens} or auto, or a smaller "
                "data.vocab_size"
            )
        return {}

    def build_layers(self, config: Config) -> list[LayerSpec]:
        # ZeRO-3 lets the weights of the head go before the loss.
        chunk = config.train.loss_chunk_tokens if config.parallel.zero < 3 else None
        return self.layer_specs(loss_chunk_tokens=chunk)

    @classmethod
    def unknown_key_remedy(cls, key: str) -> str | None:
        from pipekit.models import find_families  # which finds this class

        owner = next((name for name, family in find_families().items() if key in family.model_fields), None)
        return f"it is a setting of model.family={owner}" if owner else None

    @classmethod
    def missing_remedy(cls, keys: Sequence[str]) -> str:
        them, preset = "them" if len(keys) > 1 else "it", next(iter(cls.presets))
        return f"give {them}, or name a preset, for example model.preset={preset}"

    @model_validator(mode="before")
    @classmethod
    def _fill_sizes(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        preset = values.get("preset")
        filled = {**(cls.presets.get(preset, {}) if isinstance(preset, str) else {}), **values}
        if filled.get("ffn_size") is None:
            hidden_size = filled.get("hidden_size")
            # Where the width itself is at fault, only the width is reported.
            filled["ffn_size"] = 4 * hidden_size if type(hidden_size) is int and hidden_size > 0 else 1
        return filled

    @model_validator(mode="after")
    def _has_one_window(self) -> TransformerFamily:
        sparse = self.sparse_attention
        if sparse is not None and sparse.mode == "sliding_window" and "sliding_window" in type(self).model_fields:
            text = f"model.sparse_attention.mode=sliding_window: model.family={self.family} has a setting for that"
            raise setting_error("sparse_attention", f"{text}; write model.sliding_window={sparse.window} instead")
        return self

    @model_validator(mode="after")
    def _heads_divide_width(self) -> TransformerFamily:
        if self.hidden_size % self.num_heads:
            fitting = divisors(self.hidden_size)
            near = [n for n in fitting if n < self.num_heads][-3:] + [n for n in fitting if n > self.num_heads][:1]
            text = f"model.num_heads={self.num_heads} does not divide model.hidden_size={self.hidden_size}"
            raise setting_error("num_heads", f"{text}; try {alternatives(near)}")
        return self


def setting_error(key: str, text: str) -> PydanticCustomError:
    """Error of a validator about a setting; the text gives the place, the value, the rule and what to type instead."""
    return PydanticCustomError("rule", "{text}", {"key": key, "text": text})


def divisors(number: int) -> list[int]:
    """Divisors of a number, ascending."""
    return [n for n in range(1, number + 1) if number % n == 0]


def preset_sizes(*sizes: int | str) -> dict[str, int | str]:
    """Settings of a preset: vocabulary, width, blocks, heads and positions."""
    return dict(zip(("vocab_size", "hidden_size", "num_layers", "num_heads", "max_positions"), sizes, strict=True))
