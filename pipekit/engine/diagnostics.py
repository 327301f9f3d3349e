"""Diagnostics that DeepSpeed's configuration can ask for: `wall_clock_breakdown` and the FLOPS profiler."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from pipekit.engine.stopwatch import Stopwatch
from pipekit.schedules.action import ACTION_NAMES
from pipekit.tensors.flop_counter import make_flop_counter

if TYPE_CHECKING:
    from pipekit.engine.training_engine import TrainingEngine

_logger = logging.getLogger(__name__)


class Diagnostics:
    """Logs where the time of a step goes, and how many floating-point operations it takes.

    Args:
        engine: whose configuration says what to log, and when.
    """

    def __init__(self, engine: TrainingEngine) -> None:
        self._engine = engine
        # An engine may keep DeepSpeed from doing the same by saying no.
        settings = engine._config
        self._breaks_down = bool(settings.wall_clock_breakdown)
        profiler = settings.flops_profiler_config
        self._profiled_step = profiler.profile_step if profiler.enabled else None
        if self._breaks_down and engine.executor.stopwatch is None:
            engine.executor.stopwatch = Stopwatch(engine.device)

    @contextmanager
    def watch(self, step: int) -> Iterator[None]:
        """Watch what runs inside, the actions of a step."""
        started_s = time.perf_counter()
        if step + 1 == self._profiled_step:
            with make_flop_counter() as counter:
                yield
            flops, took_s = counter.get_total_flops(), time.perf_counter() - started_s
            self._log(step, f"{flops:.4g} floating-point operations, {flops / took_s / 1e12:.3g} TFLOP/s")
        else:
            yield
        interval = self._engine.steps_per_print()
        if self._breaks_down and interval and (step + 1) % interval == 0:
            self._log(step, self._breakdown(time.perf_counter() - started_s))

    def _breakdown(self, took_s: float) -> str:
        assert self._engine.executor.stopwatch is not None
        sums_s = dict.fromkeys(ACTION_NAMES, 0.0)
        for span in self._engine.executor.stopwatch.spans():
            sums_s[span.action.kind] += span.end_s - span.start_s
        parts = [f"{ACTION_NAMES[kind]} {seconds:.4g} s" for kind, seconds in sums_s.items() if seconds]
        return ", ".join([*parts, f"waiting and all else {took_s - sum(sums_s.values()):.4g} s"])

    def _log(self, step: int, text: str) -> None:
        _logger.info("rank %d, step %d: %s", self._engine.mpu.global_rank, step + 1, text)
