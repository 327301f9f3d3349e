"""Window of steps of a run that `profile` measures, and the files that come of it."""

from __future__ import annotations

import csv
import json
import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from pipekit.config.profile_config import ProfileConfig
from pipekit.costs.sequence_flops import device_peak_flops, show_flops_per_s
from pipekit.distributed.processes import gather_objects
from pipekit.engine.training_engine import TrainingEngine
from pipekit.errors import PipekitError
from pipekit.predictions.devices import MatmulFormat
from pipekit.schedules import Schedule, Timeline, median_costs, simulate
from pipekit.schedules.operations import Operation
from pipekit.step_profile.chrome_trace import chrome_trace
from pipekit.step_profile.clocks import CommonClock, read_clock
from pipekit.step_profile.flops import LayerFlopCounter, LayerFlops
from pipekit.step_profile.recorder import StepRecorder
from pipekit.step_profile.spans import RankSteps, StepSpan, kind_of, pipeline_timeline, table_of
from pipekit.step_profile.timelines import save_timelines
from pipekit.storage import storing

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RankProfile:
    """Measurements of one rank.

    Attributes:
        steps: its timed steps, on the common clock.
        clock_offset_s: seconds by which its own clock was ahead of the common one, at the beginning.
        clock_error_s: bound of the error of the common clock.
        flops: of a step, by layer and phase; empty where the step that counts them was not trained in this start.
        memory: seconds of the common clock and bytes.
    """

    steps: RankSteps
    clock_offset_s: float
    clock_error_s: float
    flops: LayerFlops
    memory: Sequence[tuple[float, int]]

    @property
    def model_flops(self) -> int:
        """Operations of a step without what is computed again, as MFU counts them."""
        return sum(by_phase.get(phase, 0) for by_phase in self.flops.values() for phase in ("forward", "backward"))


class ProfileWindow:
    """Measures the steps of a window, and writes what came of them into a folder at its end.

    Args:
        engine: whose steps are measured.
        settings: the window, and what else is written.
        folder: where files go.
        reports: whether this rank writes the files of all.
        matmul_format: of large matrix products, whose peak MFU compares with.
    """

    def __init__(
        self,
        engine: TrainingEngine,
        settings: ProfileConfig,
        *,
        folder: Path,
        reports: bool,
        matmul_format: MatmulFormat,
    ) -> None:
        self._engine, self._settings, self._folder, self._reports = engine, settings, folder, reports
        self._peak_flops = device_peak_flops(engine.device, matmul_format)
        self._group: dist.ProcessGroup | None = None
        if dist.get_backend() != "gloo":
            group = engine.mpu.build_group([range(engine.mpu.layout.world_size)], "gloo", purpose="headers")
            assert group is not None
            self._group = group.process_group
        self._counter: LayerFlopCounter | None = None
        self._recorder: StepRecorder | None = None
        self._profiler: torch.profiler.profile | None = None
        self._schedules: list[Schedule] = []
        self._next_step = 1
        self._text: str | None = None

    @contextmanager
    def measuring(self, step: int) -> Iterator[None]:
        """Run a step, counted from 1, inside, and measure it if it is in the window. All ranks do this together."""
        first, last = self._settings.start, self._settings.start + self._settings.steps
        if step != self._next_step:
            # After a return to an earlier checkpoint the window is measured anew.
            self._forget()
        self._next_step = step + 1
        if step == first:
            self._counter = LayerFlopCounter(self._engine)
            with self._counter.counting():
                yield
        elif first < step <= last:
            if self._recorder is None:
                self._begin()
            assert self._recorder is not None
            with self._recorder.recording():
                yield
            self._schedules.append(self._engine.schedule)
            if step == last:
                self._end(self._recorder, step)
        else:
            yield

    def take_text(self) -> str | None:
        """The table of a window that has just ended, once."""
        text, self._text = self._text, None
        return text

    def _begin(self) -> None:
        device, settings = self._engine.device, self._settings
        if settings.memory and device.type == "cuda":
            torch.cuda.memory._record_memory_history()
        if settings.trace:
            self._profiler = torch.profiler.profile()
            self._profiler.start()
        self._first_reading = read_clock(self._group)
        self._recorder = StepRecorder(self._engine.mpu.activity, device, traces=settings.trace, memory=settings.memory)

    def _end(self, recorder: StepRecorder, step: int) -> None:
        mpu, device = self._engine.mpu, self._engine.device
        steps = recorder.steps()
        clock = CommonClock(self._first_reading, read_clock(self._group))
        try:
            with storing(self._folder):
                self._write_own(mpu.global_rank, device)
        except PipekitError as error:
            _logger.warning("%s", error)
        coordinate = mpu.layout.coordinate(mpu.global_rank)
        common = [
            [replace(span, start_s=clock(span.start_s), end_s=clock(span.end_s)) for span in spans] for spans in steps
        ]
        own = RankProfile(
            RankSteps(mpu.global_rank, coordinate.pipe, coordinate.data, coordinate.tensor, common),
            clock.first.offset_s,
            clock.error_s,
            {} if self._counter is None else self._counter.results(),
            [(clock(at_s), num_bytes) for at_s, num_bytes in recorder.memory],
        )
        schedules = self._schedules
        self._forget()
        profiles = gather_objects(own)
        if not self._reports:
            return
        speeds = None
        if any(each.flops for each in profiles):
            speeds = {each.steps.rank: _speed(each, self._peak_flops) for each in profiles}
        ranks = [each.steps for each in profiles]
        self._text = (
            f"steps {step - len(schedules) + 1} to {step}, mean milliseconds of a step by rank "
            f"(files in {self._folder}):\n{table_of(ranks, speeds=speeds)}"
        )
        try:
            with storing(self._folder):
                self._folder.mkdir(parents=True, exist_ok=True)
                _write_files(profiles, schedules, self._folder, last_step=step, peak_flops=self._peak_flops)
        except PipekitError as error:
            _logger.warning("%s", error)

    def _write_own(self, rank: int, device: torch.device) -> None:
        """Write what is too large to be gathered."""
        self._folder.mkdir(parents=True, exist_ok=True)
        if self._profiler is not None:
            self._profiler.stop()
            self._profiler.export_chrome_trace(str(self._folder / f"trace-rank-{rank}.json"))
            self._profiler = None
        if self._settings.memory and device.type == "cuda":
            snapshot = self._folder / f"memory-rank-{rank}.pickle"
            torch.cuda.memory._dump_snapshot(str(snapshot))  # type: ignore[no-untyped-call]

    def _forget(self) -> None:
        """End what records, whether the window is whole or not."""
        if self._profiler is not None:
            self._profiler.stop()
        if self._recorder is not None and self._settings.memory and self._engine.device.type == "cuda":
            torch.cuda.memory._record_memory_history(enabled=None)
        self._recorder, self._profiler, self._schedules = None, None, []


def _speed(profile: RankProfile, peak_flops: float | None) -> str:
    per_s = profile.model_flops / profile.steps.step_s
    return show_flops_per_s(per_s) + ("" if peak_flops is None else f" (MFU {per_s / peak_flops:.1%})")


def _write_files(
    profiles: Sequence[RankProfile],
    schedules: Sequence[Schedule],
    folder: Path,
    *,
    last_step: int,
    peak_flops: float | None,
) -> None:
    ranks = [each.steps for each in profiles]
    first_step = last_step - len(schedules) + 1
    _write_json(
        folder / "actions.json",
        {
            "steps": [first_step, last_step],
            "ranks": [
                {
                    "rank": each.steps.rank,
                    "step_s": each.steps.step_s,
                    "seconds": each.steps.seconds_by_kind(),
                    "clock_offset_s": each.clock_offset_s,
                    "clock_error_s": each.clock_error_s,
                    "model_flops": each.model_flops or None,
                    "mfu": each.model_flops / each.steps.step_s / peak_flops if peak_flops else None,
                }
                for each in profiles
            ],
        },
    )
    with (folder / "actions.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["step", "rank", "kind", "operation", "start_s", "end_s"])
        for rank in ranks:
            for step, spans in enumerate(rank.steps, first_step):
                for span in spans:
                    writer.writerow((step, rank.rank, span.kind, span.operation, span.start_s, span.end_s))
    if any(each.flops for each in profiles):
        _write_json(folder / "flops.json", {str(each.steps.rank): each.flops for each in profiles})
    for each in profiles:
        if each.memory:
            _write_json(folder / f"memory-rank-{each.steps.rank}.json", {"seconds_and_bytes": each.memory})
    planned: dict[int, list[StepSpan]] = {rank.rank: [] for rank in ranks}
    for pipeline in _pipelines(ranks):
        for step, schedule in enumerate(schedules):
            measured, zero_s = pipeline_timeline(pipeline, schedule, step)
            simulated = simulate(schedule, median_costs([measured]))
            for rank, spans in zip(pipeline, _planned_spans(measured, simulated, zero_s), strict=True):
                planned[rank.rank] += spans
        if pipeline[0].rank == 0:
            save_timelines(measured, simulated, folder / f"step-{last_step:08d}")
    memory = {each.steps.rank: each.memory for each in profiles}
    _write_json(folder / "timeline.json", chrome_trace(ranks, planned, memory))


def _pipelines(ranks: Sequence[RankSteps]) -> list[list[RankSteps]]:
    found: dict[tuple[int, int], list[RankSteps]] = {}
    for rank in sorted(ranks, key=lambda each: each.pipe):
        found.setdefault((rank.data, rank.tensor), []).append(rank)
    return list(found.values())


def _planned_spans(measured: Timeline, simulated: Timeline, zero_s: float) -> Iterator[list[StepSpan]]:
    """Spans of each rank as simulated, from where the first action was measured to begin."""
    begun_s = zero_s + min((spans[0].start_s for spans in measured.spans if spans), default=math.nan)
    for spans in simulated.spans:
        operations = [(Operation("run", span.action), span) for span in spans]
        yield [StepSpan(kind_of(each), str(each), begun_s + s.start_s, begun_s + s.end_s) for each, s in operations]


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value) + "\n", encoding="utf-8")
