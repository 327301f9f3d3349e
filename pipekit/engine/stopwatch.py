"""Times the actions of a step, on CPUs by the clock and on GPUs by events of the stream."""

from __future__ import annotations

import time

import torch

from pipekit.schedules import Action, Span


class Stopwatch:
    """Times the actions of one step on one rank; waiting for another rank does not count.

    Args:
        device: what the actions run on.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._begun: float | torch.cuda.Event = 0.0
        self._marks: list[tuple[Action, float | torch.cuda.Event]] = []

    def begin(self) -> None:
        """Begin a step, and forget the one before."""
        self._marks = []
        self._begun = self._now()

    def start(self, action: Action) -> None:
        """Note that an action starts."""
        self._marks.append((action, self._now()))

    def stop(self, action: Action) -> None:
        """Note that the action that started last has ended."""
        assert self._marks[-1][0] == action
        self._marks.append((action, self._now()))

    def _now(self) -> float | torch.cuda.Event:
        if not self._cuda:
            return time.perf_counter()
        event: torch.cuda.Event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    def _since(self, mark: float | torch.cuda.Event) -> float:
        if isinstance(mark, float):
            assert isinstance(self._begun, float)
            return mark - self._begun
        assert isinstance(self._begun, torch.cuda.Event)
        elapsed_ms: float = self._begun.elapsed_time(mark)
        return elapsed_ms / 1000

    def spans(self) -> list[Span]:
        """Start and end of the last step's actions, in seconds since it began, in order."""
        if self._cuda:
            torch.cuda.synchronize()
        starts, stops = self._marks[::2], self._marks[1::2]
        return [
            Span(action, self._since(start), self._since(stop))
            for (action, start), (_, stop) in zip(starts, stops, strict=True)
        ]
