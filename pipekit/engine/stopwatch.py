"""Times of steps and their actions, on CPUs by the clock and on GPUs by events of the stream."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from pipekit.schedules import Action, Span


@dataclass(frozen=True)
class Moment:
    """The moment at which a device has done what was launched on it until now.

    Attributes:
        mark: seconds of the host's clock, or an event of the device's stream.
    """

    mark: float | torch.cuda.Event

    @classmethod
    def now(cls, device: torch.device) -> Moment:
        """Mark the moment, without waiting for it."""
        if device.type != "cuda":
            return cls(time.perf_counter())
        event: torch.cuda.Event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return cls(event)

    def since(self, earlier: Moment) -> float:
        """Seconds since an earlier moment on the same device; waits for this one."""
        if isinstance(self.mark, float):
            assert isinstance(earlier.mark, float)
            return self.mark - earlier.mark
        assert isinstance(earlier.mark, torch.cuda.Event)
        self.mark.synchronize()
        elapsed_ms: float = earlier.mark.elapsed_time(self.mark)
        return elapsed_ms / 1000


class Stopwatch:
    """Times the actions of one step on one rank; waiting for another rank does not count.

    Args:
        device: what the actions run on.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._begun = Moment(0.0)
        self._marks: list[tuple[Action, Moment]] = []

    def begin(self) -> None:
        """Begin a step, and forget the one before."""
        self._marks = []
        self._begun = Moment.now(self._device)

    def start(self, action: Action) -> None:
        """Note that an action starts."""
        self._marks.append((action, Moment.now(self._device)))

    def stop(self, action: Action) -> None:
        """Note that the action that started last has ended."""
        assert self._marks[-1][0] == action
        self._marks.append((action, Moment.now(self._device)))

    @property
    def is_empty(self) -> bool:
        """True if no action of the step has been timed."""
        return not self._marks

    def spans(self) -> list[Span]:
        """Start and end of the last step's actions, in seconds since it began, in order."""
        starts, stops = self._marks[::2], self._marks[1::2]
        return [
            Span(action, start.since(self._begun), stop.since(self._begun))
            for (action, start), (_, stop) in zip(starts, stops, strict=True)
        ]
