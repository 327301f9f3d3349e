"""The `lora` section: low-rank adapters, trained in place of the weights of a model."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, PositiveFloat, PositiveInt

from pipekit.settings.base import PathText, Section, at_most


class LoraConfig(Section):
    """LoRA: low-rank adapters of linear layers, trained in place of the model's own parameters."""

    rank: Annotated[PositiveInt, at_most(2**16, "the weights themselves have no larger rank")] | None = Field(
        default=None, examples=[16]
    )
    """Rank of the adapters; null trains the parameters of the model itself."""

    alpha: PositiveFloat | None = Field(default=None, examples=[32.0])
    """Numerator of the factor `alpha / rank` on the output of adapters; null takes `rank`, a factor of 1."""

    rslora: bool = False
    """Multiply by `alpha / sqrt(rank)` instead."""

    dropout: Annotated[float, Field(ge=0, lt=1), at_most(0.95, "too little is left to learn from")] = 0.0
    """Probability of zeroing an input of an adapter during training."""

    targets: Annotated[tuple[Annotated[str, Field(min_length=1)], ...], Field(strict=False, min_length=1)] = Field(
        default=("*",), examples=[["q_proj", "v_proj"]]
    )
    """Linear layers that get an adapter: their names in checkpoints or in `transformers`, or the ends of these after a
    dot, where `*` stands for any text. By default all, except the head of a built-in model."""

    base: PathText | None = Field(default=None, min_length=1, examples=["runs/my-run"])
    """Run or checkpoint whose weights to adapt; they stay as they are. null takes those of `model.init_from`."""

    init_from: PathText | None = Field(default=None, min_length=1, examples=["downloads/my-adapter"])
    """Folder of an adapter in `peft`'s format to start from; null initializes a new one, which adds nothing at
    first."""

    @property
    def scale(self) -> float:
        """Factor of what an adapter adds."""
        assert self.rank is not None
        alpha = self.rank if self.alpha is None else self.alpha
        return float(alpha / (self.rank**0.5 if self.rslora else self.rank))
