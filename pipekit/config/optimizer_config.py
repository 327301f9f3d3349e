"""The sections `optimizer` and `scheduler`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from pipekit.optimizers.learning_rates import SCHEDULES, schedule_name
from pipekit.optimizers.table import NOT_THERE, OPTIMIZERS, SECTION_KEYS, optimizer_name
from pipekit.settings.base import Section, alternatives, at_least, at_most
from pipekit.settings.suggest import closest

Fraction = Annotated[float, Field(ge=0, lt=1)]

Betas = Annotated[tuple[Fraction, Fraction], Field(strict=False)]

Eps = Annotated[
    PositiveFloat,
    at_least(1e-30, "it would be 0 in 32 bits"),
    at_most(1000, "the updates would vanish"),
]

WeightDecay = Annotated[NonNegativeFloat, at_most(1000, "the weights would vanish")]

Pattern = Annotated[str, Field(min_length=1)]


def _known_name(
    names: Iterable[str],
    find: Callable[[str], str | None],
    not_there: Mapping[str, str],
    prefix: str = "",
) -> AfterValidator:
    """Validator of a name in a table, which it writes as the table does, or of code, as `module:name`."""

    def check(text: str) -> str:
        if (name := find(text)) is not None:
            return name
        if (reason := not_there.get(text.lower())) is not None:
            raise ValueError(reason)
        module, _, attribute = text.partition(":") if ":" in text else text.rpartition(".")
        if module and attribute and module != prefix:
            return f"{module}:{attribute}"
        match = closest(attribute or text, names)
        hint = f"did you mean {match}?" if match else "or write package.module:name of your own"
        raise ValueError(f"must be {alternatives(names)}; {hint}")

    return AfterValidator(check)


class OptimizerGroup(Section):
    """Parameters with settings of their own."""

    match: Pattern | Annotated[tuple[Pattern, ...], Field(strict=False, min_length=1)] = Field(
        default=..., examples=["*.bias"]
    )
    """Names of parameters in checkpoints, in which `*` stands for any text; a parameter belongs to the first group that
    matches it."""

    frozen: bool = False
    """Do not train them, as with `train.freeze`."""

    lr_scale: PositiveFloat | None = Field(default=None, examples=[0.1])
    """Factor of the learning rate."""

    weight_decay: WeightDecay | None = Field(default=None, examples=[0.0])
    """Decay towards zero, of vectors too."""

    betas: Betas | None = Field(default=None, examples=[[0.9, 0.95]])
    """As `optimizer.betas`."""

    eps: Eps | None = Field(default=None, examples=[1e-8])
    """As `optimizer.eps`."""

    momentum: Fraction | None = Field(default=None, examples=[0.9])
    """As `optimizer.momentum`."""

    algorithm: Literal["muon", "adamw"] | None = Field(default=None, examples=["adamw"])
    """Of `muon`: the algorithm for these matrices."""

    @property
    def patterns(self) -> tuple[str, ...]:
        """The patterns, also where there is one."""
        return (self.match,) if isinstance(self.match, str) else self.match

    @property
    def settings(self) -> dict[str, Any]:
        """The settings that are given, by their names in a parameter group of torch's."""
        own = self.model_dump(exclude={"match", "frozen"})
        return {key: value for key, value in own.items() if value is not None}


class OptimizerConfig(Section):
    """Optimizer: the algorithm that turns gradients into updates, and its settings."""

    type: Annotated[str, _known_name(OPTIMIZERS, optimizer_name, NOT_THERE, "torch.optim")] = Field(
        default="adamw", examples=["adamw"]
    )
    """The algorithm, or `package.module:Class` of your own."""

    lr: Annotated[
        PositiveFloat,
        at_least(1e-15, "no weight in 32 bits would change"),
        at_most(1000, "no training survives its first step"),
    ] = Field(default=3e-4, examples=[3e-4])
    """Peak learning rate."""

    betas: Betas | None = Field(default=(0.9, 0.95), examples=[[0.9, 0.95]])
    """Decay of the moving averages of the gradient and of its square."""

    eps: Eps | None = Field(default=1e-8, examples=[1e-8])
    """Added to the denominator of an update."""

    weight_decay: WeightDecay | None = Field(default=0.1, examples=[0.1])
    """Strength of the decay of weight matrices towards zero."""

    momentum: Fraction = Field(default=0.0, examples=[0.9])
    """Momentum of `sgd`, `rmsprop` and `muon`."""

    args: dict[str, Any] = Field(default={}, examples=[{"amsgrad": True}])
    """Further arguments of the class, such as `amsgrad` of `adamw`."""

    groups: Annotated[tuple[OptimizerGroup, ...], Field(strict=False)] = Field(
        default=(), examples=[[{"match": "embed*", "lr_scale": 0.1}]]
    )
    """Parameters with settings of their own."""

    @model_validator(mode="before")
    @classmethod
    def _take_defaults_of_the_algorithm(cls, values: Any) -> Any:
        """Give each key the default that its algorithm has; null where it does not take the key."""
        if not isinstance(values, dict) or not isinstance(values.get("type", "adamw"), str):
            return values
        kind = OPTIMIZERS.get(optimizer_name(values.get("type", "adamw")) or "")
        taken = {} if kind is None else kind.settings
        filled = dict(values)
        for key in SECTION_KEYS:
            nothing = 0.0 if key == "momentum" else None
            default = cls.model_fields[key].default
            is_default = key in values and _plain(values[key]) == _plain(default)
            if key not in values or (is_default and key not in taken and kind is not None):
                filled[key] = taken.get(key, nothing)
        return filled


class SchedulerConfig(Section):
    """Schedule of the learning rate over the steps."""

    type: Annotated[str, _known_name(SCHEDULES, schedule_name, {})] = Field(default="cosine", examples=["wsd"])
    """Curve of the learning rate, or `package.module:function` of your own."""

    warmup_steps: NonNegativeInt = Field(default=0, examples=[20])
    """Steps over which the rate rises linearly to its peak."""

    warmup_tokens: PositiveInt | None = Field(default=None, examples=[10_000_000])
    """The same in tokens, in place of `warmup_steps`."""

    min_lr_ratio: Annotated[float, Field(ge=0, le=1)] = Field(default=0.1, examples=[0.1])
    """Rate at the end of the decay, as a fraction of the peak."""

    decay_steps: PositiveInt | None = Field(default=None, examples=[300])
    """Step, counted from the start, at which the decay ends; null takes `train.steps`."""

    decay_tokens: PositiveInt | None = Field(default=None, examples=[1_000_000_000])
    """The same in tokens, in place of `decay_steps`."""

    args: dict[str, Any] = Field(default={}, examples=[{}])
    """Further settings of a schedule, such as `cooldown_steps` of `wsd`, or keyword arguments of your own function."""


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, (list, tuple)) else value
