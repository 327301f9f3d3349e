"""Scaling of rotary positions, which lets a model read longer sequences than it was first trained on."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from pipekit.errors import ConfigError
from pipekit.models.family import setting_error
from pipekit.settings.base import Section, alternatives

if TYPE_CHECKING:
    from torch import Tensor

_REQUIRED: dict[str, tuple[str, ...]] = {
    "linear": (),
    "dynamic": (),
    "llama3": ("original_max_positions", "low_freq_factor", "high_freq_factor"),
    "yarn": ("original_max_positions",),
    "longrope": ("original_max_positions", "short_factor", "long_factor"),
}
_OPTIONAL = {
    "longrope": ("attention_factor",),
    "yarn": ("beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim", "truncate"),
}
_THEIR_NAMES = {"type": "rope_type", "original_max_positions": "original_max_position_embeddings"}
_OUR_NAMES = {"original_max_position_embeddings": "original_max_positions"}


class RotaryScaling(Section):
    """Longer wavelengths of rotary positions.

    Source: `modeling_rope_utils.py` of transformers 5; Peng et al. 2023, "YaRN: Efficient Context Window Extension of
    Large Language Models"; Llama Team 2024, "The Llama 3 Herd of Models".
    """

    type: Literal["linear", "dynamic", "llama3", "yarn", "longrope"]
    """`linear` scales all wavelengths; `dynamic` none up to `max_positions`, which no sequence here exceeds; `llama3`
    the long ones; `yarn` blends scaled and unscaled ones, and also scales attention; `longrope` has a factor for
    each."""

    factor: PositiveFloat = Field(examples=[8.0])
    """Factor of the wavelengths."""

    original_max_positions: PositiveInt | None = Field(default=None, examples=[8192])
    """Longest sequence before the scaling, in tokens."""

    low_freq_factor: PositiveFloat | None = Field(default=None, examples=[1.0])
    """`llama3`: wavelengths above `original_max_positions` divided by this are scaled fully."""

    high_freq_factor: PositiveFloat | None = Field(default=None, examples=[4.0])
    """`llama3`: wavelengths below `original_max_positions` divided by this are not scaled."""

    beta_fast: PositiveFloat | None = Field(default=None, examples=[32.0])
    """`yarn`: dimensions with at least this many rotations within `original_max_positions` are not scaled; default
    32."""

    beta_slow: PositiveFloat | None = Field(default=None, examples=[1.0])
    """`yarn`: dimensions with at most this many rotations within `original_max_positions` are scaled fully; default
    1."""

    attention_factor: PositiveFloat | None = Field(default=None, examples=[1.2])
    """`yarn`, `longrope`: factor of rotated queries and of rotated keys; by default it follows from `factor`."""

    short_factor: Annotated[tuple[PositiveFloat, ...], Field(strict=False)] | None = None
    """`longrope`: factor of each wavelength in sequences of up to `original_max_positions`."""

    long_factor: Annotated[tuple[PositiveFloat, ...], Field(strict=False)] | None = None
    """`longrope`: factor of each wavelength in longer sequences."""

    mscale: PositiveFloat | None = Field(default=None, examples=[1.0])
    """`yarn`: with `mscale_all_dim`, gives `attention_factor`."""

    mscale_all_dim: PositiveFloat | None = Field(default=None, examples=[1.0])
    """`yarn`: with `mscale`, gives `attention_factor`."""

    truncate: bool | None = Field(default=None, examples=[True])
    """`yarn`: whether to widen the blended range to whole dimensions; default true."""

    @model_validator(mode="after")
    def _has_what_its_type_needs(self) -> RotaryScaling:
        allowed = {"type", "factor", *_REQUIRED[self.type], *_OPTIONAL.get(self.type, ())}
        given = {name for name, value in self if value is not None}
        if missing := [name for name in _REQUIRED[self.type] if name not in given]:
            raise setting_error("type", f"model.rotary_scaling.type={self.type} needs {alternatives(missing, 'and')}")
        if extra := sorted(given - allowed):
            raise setting_error(
                "type", f"model.rotary_scaling.type={self.type} has no {alternatives(extra)}; leave that out"
            )
        return self

    def scale(self, frequencies: Tensor, base: float, num_tokens: int | Tensor) -> tuple[Tensor, float]:
        """Scaled frequencies in radians per token, and the factor of cosines and sines.

        Args:
            frequencies: `(R / 2)`, in fp32, base^(-i / R) for i = 0, 2, 4, ...
            base: base of the wavelengths.
            num_tokens: length of the sequence; or `(B, S, 1)`, the length of each token's document, for frequencies
                `(B, S, R / 2)`.
        """
        if self.type == "linear":
            return frequencies / self.factor, 1.0
        if self.type == "llama3":
            return self._scale_long(frequencies), 1.0
        if self.type == "yarn":
            return self._blend(frequencies, base), self._attention_factor()
        if self.type == "longrope":
            assert self.original_max_positions is not None
            is_long = num_tokens > self.original_max_positions
            long, short = (frequencies / frequencies.new_tensor(each) for each in (self.long_factor, self.short_factor))
            if isinstance(is_long, bool):
                return long if is_long else short, self._attention_factor()
            return is_long * long + ~is_long * short, self._attention_factor()
        return frequencies, 1.0

    def _scale_long(self, frequencies: Tensor) -> Tensor:
        assert self.original_max_positions is not None
        assert self.low_freq_factor is not None
        assert self.high_freq_factor is not None
        wavelengths = 2 * math.pi / frequencies
        turns = self.original_max_positions / wavelengths
        share = ((turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)).clamp(0, 1)
        return (1 - share) * frequencies / self.factor + share * frequencies

    def _blend(self, frequencies: Tensor, base: float) -> Tensor:
        import torch

        assert self.original_max_positions is not None
        size, length = 2 * len(frequencies), self.original_max_positions

        def dimension_of(turns: float) -> float:
            """The dimension that turns so often within the original length."""
            return size * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(base))

        low, high = dimension_of(self.beta_fast or 32), dimension_of(self.beta_slow or 1)
        if self.truncate is not False:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, size - 1)
        if low == high:
            high += 0.001
        dimensions = torch.arange(len(frequencies), dtype=torch.float32, device=frequencies.device)
        kept = 1 - ((dimensions - low) / (high - low)).clamp(0, 1)
        return frequencies / self.factor * (1 - kept) + frequencies * kept

    def _attention_factor(self) -> float:
        def magnitude(scale: float) -> float:
            return 1.0 if self.factor <= 1 else 0.1 * scale * math.log(self.factor) + 1.0

        if self.attention_factor is not None:
            return self.attention_factor
        if self.type == "longrope":
            assert self.original_max_positions is not None
            growth = math.log(max(self.factor, 1.0)) / math.log(self.original_max_positions)
            return math.sqrt(1 + growth)
        if self.mscale and self.mscale_all_dim:
            return magnitude(self.mscale) / magnitude(self.mscale_all_dim)
        return magnitude(1.0)

    def to_hf(self) -> dict[str, Any]:
        """Value of `rope_scaling` in a `config.json`."""
        given = (
            (name, list(value) if isinstance(value, tuple) else value) for name, value in self if value is not None
        )
        return {_THEIR_NAMES.get(name, name): value for name, value in given}


def read_rope_parameters(stored: Mapping[str, Any], *, where: str) -> tuple[float | None, RotaryScaling | None]:
    """Base and scaling of rotary positions in a `config.json` of transformers 4 or 5; a ConfigError if unknown."""
    parameters = stored.get("rope_parameters") or {}
    base = parameters.get("rope_theta", stored.get("rope_theta"))
    scaling = {**(stored.get("rope_scaling") or parameters)}
    kind: Any = scaling.get("rope_type", scaling.get("type", "default"))
    kind = "longrope" if kind == "su" else kind  # its first name
    if kind == "default":
        return base, None
    if kind not in _REQUIRED:
        known = alternatives(map(repr, ["default", *_REQUIRED]))
        raise ConfigError(f"{where}/config.json: rope_type={kind!r}; only {known} are known")
    if "original_max_positions" in _REQUIRED[kind]:
        # Where Phi 3 has it, or else that of the model.
        longest = stored["max_position_embeddings"]
        original = stored.get("original_max_position_embeddings") or scaling.get("original_max_position_embeddings")
        scaling["original_max_position_embeddings"] = original or longest
        if scaling.get("factor") is None:
            scaling["factor"] = longest / scaling["original_max_position_embeddings"]
    values: dict[str, Any] = {}
    for theirs, value in scaling.items():
        name = _OUR_NAMES.get(theirs, theirs)
        if value is not None and name not in ("type", "rope_type", "rope_theta"):
            is_number = name.endswith(("factor", "scale", "dim", "fast", "slow")) and not isinstance(value, list)
            values[name] = float(value) if is_number else value
    known_names = {"factor", "original_max_positions", *_REQUIRED[kind], *_OPTIONAL.get(kind, ())}
    if unknown := sorted(values.keys() - known_names):
        raise ConfigError(f"{where}/config.json: rope_type={kind!r} with {', '.join(unknown)}; that is not known")
    if kind in ("linear", "dynamic"):
        values.pop("original_max_positions", None)
    return base, RotaryScaling(type=kind, **values)
