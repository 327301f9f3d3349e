"""Section `profile`: a window of steps that are measured, and its rule."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from pydantic import NonNegativeInt, PositiveInt

from pipekit.settings.base import Fault, Section, rule_fault

if TYPE_CHECKING:
    from pipekit.config.schema import TrainConfig


class ProfileConfig(Section):
    """Profile: a window of steps whose time, operations and memory are measured, by rank."""

    start: PositiveInt = 10
    """Step whose floating-point operations are counted; the steps after it are timed."""

    steps: NonNegativeInt = 0
    """Number of steps to time; 0 measures nothing."""

    trace: bool = False
    """Write a `torch.profiler` trace for each rank, to open in Perfetto. It makes the timed steps slower."""

    memory: bool = False
    """Write the memory of each rank at every action, and on GPUs torch's record of allocations."""


def profile_fits_steps(profile: ProfileConfig, train: TrainConfig) -> Iterator[Fault]:
    """The window of a profile ends with the training at the latest."""
    last = profile.start + profile.steps
    if profile.steps and train.has_steps and last > train.steps:
        start = train.steps - profile.steps
        advice = f"profile.start={start}, or " if start > 0 else ""
        yield rule_fault(
            "profile.start profile.steps",
            f"profile.start={profile.start} and profile.steps={profile.steps} measure until step {last}, and "
            f"train.steps={train.steps} are trained; try {advice}train.steps={last}",
        )


PROFILE_RULES = ((("profile", "train"), profile_fits_steps),)
