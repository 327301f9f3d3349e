"""Base class of the callbacks that ship with pipekit."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pipekit.training.trial_callbacks import TrialCallback

if TYPE_CHECKING:
    from pipekit.training.context import TrialContext
    from pipekit.training.trial import Trial


class ShippedCallback(TrialCallback):
    """Callback with access to the trial's context.

    Args:
        context: context of the trial.
    """

    def __init__(self, context: TrialContext) -> None:
        self.context = context

    def check(self, trial: Trial, *, evaluates: bool) -> None:
        """Check that the trial has what the callback needs; called on every rank before anything is trained.

        Args:
            trial: the trial.
            evaluates: whether the trial has validations.

        Raises:
            PipekitError: if the trial lacks something that the callback needs.
        """

    @property
    def is_first(self) -> bool:
        """True on the rank that writes files and shows output."""
        return self.context.distributed.rank == 0
