"""Activity of a rank: its current phase and operation."""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Callable

from pipekit.schedules.operations import Operation

_REMEMBERED_STEPS = 20
_FEWEST_STEPS = 3


class Activity:
    """Current phase and operation of a rank, which its main thread notes for the thread of its heartbeat.

    A note is a single assignment, so that neither thread waits for the other.

    Attributes:
        phase: a name such as "step 12", and the time at which it began, of `time.monotonic`.
        operation: the operation, or words for it such as "updating the weights", and the time at which it began.
        observer: called with what begins, before it does, while a step is profiled; None at all other times.
        usual_step_s: median duration of the last steps; None until there are some. The first step is left out, since it
            compiles and allocates.
    """

    def __init__(self) -> None:
        self.phase = "start", time.monotonic()
        self.operation: tuple[Operation | str, float] = "building the engine", time.monotonic()
        self.observer: Callable[[Operation | str], None] | None = None
        self.usual_step_s: float | None = None
        self._durations_s: deque[float] = deque(maxlen=_REMEMBERED_STEPS)
        self._step_began_s: float | None = None
        self._is_first_step = True

    def begin(self, phase: str, doing: str) -> None:
        """Note the beginning of a phase, which ends the one before, and its first operation in words."""
        now_s = time.monotonic()
        self.phase, self.operation = (phase, now_s), (doing, now_s)
        if self._step_began_s is None:
            return
        if not self._is_first_step:
            self._durations_s.append(now_s - self._step_began_s)
        self._is_first_step = False
        if len(self._durations_s) >= _FEWEST_STEPS:
            self.usual_step_s = statistics.median(self._durations_s)
        self._step_began_s = None

    def begin_step(self, step: int) -> None:
        """Note the beginning of a training step; the next phase ends it."""
        self.begin(f"step {step}", "beginning the step")
        self._step_began_s = self.phase[1]

    def note(self, operation: Operation | str) -> None:
        """Note the beginning of an operation."""
        self.operation = operation, time.monotonic()
        if self.observer is not None:
            self.observer(operation)
