"""Metrics of a trial: those of each call of its methods and those of its reducers, reported together."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

from pipekit.errors import PipekitError
from pipekit.training.context import TrialContext
from pipekit.training.gather_metrics import gather_metrics
from pipekit.training.reducers import BatchMetrics, Reducer, WrappedReducer, wrap_reducer


class TrialMetrics:
    """The metrics of training, or of one validation, on one rank.

    Args:
        context: the trial's, whose reducers report along.
        source: the trial's method that returns the metrics of a batch.
        reducer: of all of these, or of each by its name.
        for_training: whether these are the metrics of training.

    Attributes:
        gathers: whether all ranks meet for a report.
        fault: the first mistake in what the method has returned on this rank, which stops all ranks where they meet.
    """

    gathers = True

    def __init__(
        self, context: TrialContext, source: str, reducer: Reducer | dict[str, Reducer], *, for_training: bool
    ) -> None:
        self._reports = context.role.should_report_metrics
        self._batches = BatchMetrics(reducer, source=source)
        wrapped = [each for each in context.reducers if (each.for_training if for_training else each.for_validation)]
        self._reducers: list[WrappedReducer] = [wrap_reducer(self._batches), *wrapped]
        self.fault: PipekitError | None = None

    @property
    def are_here(self) -> bool:
        """True if a report need not wait for the device."""
        return True

    def update(self, metrics: Any, num_samples: int) -> None:
        """Add what the method returned for so many samples."""
        if not self._reports or self.fault is not None:
            return
        try:
            self._batches.update(metrics, weight=num_samples or 1.0)
        except PipekitError as fault:
            self.fault = fault

    def report(self) -> tuple[dict[str, Any], list[dict[str, float]]]:
        """Return the metrics of all ranks, and those of each call on this rank, and forget them.

        All ranks call this together.
        """
        batches = self._batches.batches()
        metrics = gather_metrics(self._reducers, reports=self._reports)
        self.reset()
        return metrics, batches

    def reset(self) -> None:
        """Forget all metrics."""
        for wrapped in self._reducers:
            wrapped.reducer.reset()


@contextlib.contextmanager
def kept(reducers: list[WrappedReducer]) -> Iterator[None]:
    """Restore the reducers of a trial after the block to what they held before it."""
    states = [copy.deepcopy(vars(wrapped.reducer)) for wrapped in reducers]
    try:
        yield
    finally:
        for wrapped, state in zip(reducers, states, strict=True):
            vars(wrapped.reducer).clear()
            vars(wrapped.reducer).update(state)
