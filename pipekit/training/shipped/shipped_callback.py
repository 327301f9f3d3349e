"""Base class of the callbacks that ship with pipekit."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pipekit.training.trial_callbacks import TrialCallback

if TYPE_CHECKING:
    from pipekit.training.context import TrialContext
    from pipekit.training.trial import Trial


class ShippedCallback(TrialCallback):
    """Callback that knows the trial's context.

    Args:
        context: the trial's.
    """

    def __init__(self, context: TrialContext) -> None:
        self.context = context

    def check(self, trial: Trial, *, evaluates: bool) -> None:
        """Check that the trial has what the callback needs; called on every rank before anything is trained.

        Args:
            trial: the trial.
            evaluates: whether it is validated.

        Raises:
            PipekitError: if it has not.
        """

    @property
    def is_first(self) -> bool:
        """True on the rank that writes and shows things."""
        return self.context.distributed.rank == 0
