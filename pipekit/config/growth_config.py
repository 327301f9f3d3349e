"""Curriculum by sequence length, batch-size warm-up and progressive layer drop: what changes from step to step."""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, PositiveInt

from pipekit.settings.base import Section

_Lengths = Annotated[tuple[PositiveInt, ...], Field(strict=False, min_length=1)]


class CurriculumConfig(Section):
    """Curriculum by sequence length: training begins with short sequences, each the beginning of a whole one."""

    type: Literal["linear", "root", "discrete"] = "linear"
    """Growth of the length: `linear` in the steps, with a `root` of them, or `discrete`, as a list says."""

    min_difficulty: PositiveInt | None = Field(default=None, examples=[64])
    """`linear`, `root`: tokens of a sequence in the first step."""

    max_difficulty: PositiveInt | None = Field(default=None, examples=[1024])
    """`linear`, `root`: tokens of a sequence at the end; null is `train.sequence_length`."""

    total_curriculum_step: PositiveInt | None = Field(default=None, examples=[15_000])
    """`linear`, `root`: steps until the length has grown to the end."""

    difficulty_step: PositiveInt | None = Field(default=None, examples=[8])
    """`linear`, `root`: every length before the last is a multiple of this; 8 unless given."""

    root_degree: PositiveInt | None = Field(default=None, examples=[2])
    """`root`: degree of the root; 2 is the square root."""

    difficulty: _Lengths | None = Field(default=None, examples=[[64, 256, 1024]])
    """`discrete`: the lengths, in growing order."""

    max_step: _Lengths | None = Field(default=None, examples=[[5_000, 10_000]])
    """`discrete`: the last step with each length but the last one."""

    def length_at(self, step: int, longest: int) -> int:
        """Tokens of a sequence in a step, counted from 1.

        Args:
            step: number of the step.
            longest: `train.sequence_length`.

        Source: Li, Zhang and He 2022, "The Stability-Efficiency Dilemma: Investigating Sequence Length Warmup for
        Training GPT Models"; DeepSpeed, `runtime/data_pipeline/curriculum_scheduler.py`.

        Example:
            >>> curriculum = CurriculumConfig(min_difficulty=16, total_curriculum_step=10, difficulty_step=8)
            >>> [curriculum.length_at(step, 64) for step in (1, 5, 10, 11)]
            [16, 40, 64, 64]
        """
        if self.difficulty is not None and self.max_step is not None:
            return self.difficulty[sum(step > last for last in self.max_step)]
        assert self.min_difficulty is not None
        assert self.total_curriculum_step is not None
        first, last, unit = self.min_difficulty, self.max_difficulty or longest, self.known_difficulty_step
        fraction: float = (step / self.total_curriculum_step) ** (1.0 / (self.root_degree or 1))
        length = math.floor(fraction * (last - first) + first)
        return min(max(length - length % unit, -(-first // unit) * unit), last)

    @property
    def known_difficulty_step(self) -> int:
        """`difficulty_step`, also where it is not given."""
        return self.difficulty_step or 8


class BatchWarmupConfig(Section):
    """Batch-size warm-up: steps have few micro-batches at first, and more and more while samples are consumed."""

    start: PositiveInt = Field(default=..., examples=[32])
    """Sequences of the first step."""

    increment: PositiveInt = Field(default=..., examples=[32])
    """Sequences that are added to a step at a time, until there are `train.global_batch_size`."""

    samples: PositiveInt = Field(default=..., examples=[100_000])
    """Sequences that are consumed until the batch has its whole size; all sizes before get equal shares of them."""

    def size_at(self, position: int, largest: int) -> int:
        """Sequences of the step that begins after `position` samples.

        Args:
            position: samples consumed before.
            largest: `train.global_batch_size`.

        Source: Megatron-LM, `--rampup-batch-size`.

        Example:
            >>> warmup = BatchWarmupConfig(start=2, increment=2, samples=12)
            >>> [warmup.size_at(position, 8) for position in (0, 3, 4, 8, 12)]
            [2, 2, 4, 6, 8]
        """
        return min(largest, self.start + self.increment * (position * self._num_increments(largest) // self.samples))

    def end_of_size(self, position: int, largest: int) -> int:
        """The first position after `position` at which a step has another size."""
        num_increments = self._num_increments(largest)
        return -(-(position * num_increments // self.samples + 1) * self.samples // num_increments)

    def _num_increments(self, largest: int) -> int:
        return (largest - self.start) // self.increment


class LayerDropConfig(Section):
    """Progressive layer drop: blocks are left out at random, the deeper and the later the more often."""

    theta: Annotated[float, Field(gt=0, le=1)] = Field(default=0.5, examples=[0.5])
    """Probability of keeping the last block that is approached in the long run; those before are kept more often."""

    gamma: NonNegativeFloat = Field(default=0.001, examples=[0.001])
    """Speed at which it is approached, per step."""
