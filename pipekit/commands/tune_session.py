"""Tuning run: the candidates of a configuration, measured one after the other."""

from __future__ import annotations

import logging
import os
import shutil
import signal
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from pipekit.config import Config
from pipekit.errors import LaunchError, LayoutError, PipekitError
from pipekit.launch.environment import detect_ranks
from pipekit.launch.failures import HangError, RankError, describe_failure
from pipekit.launch.local import run_plan
from pipekit.launch.resources import check_process_count, find_resources
from pipekit.plan.resources import Resources
from pipekit.progress import ProgressCallback, ProgressLines
from pipekit.signals import ending_at_once
from pipekit.tune import TIMING_TASK
from pipekit.tune.candidates import ZERO_STAGES, Choice, list_choices, parse_fixed
from pipekit.tune.search import Measured

WARM_UP_STEPS = 3
_OUT_OF_MEMORY = ("out of memory", "OutOfMemory", "can't allocate memory", "bad_alloc")
# Anything that a run does besides its steps, or would write outside its folder.
_LEFT_OUT: dict[str, Any] = {
    "train.eval_interval": None,
    "checkpoint.resume": "never",
    "logging.wandb": None,
    "logging.tensorboard": False,
    "logging.trackio": None,
    "profile.steps": 0,
}


@dataclass(frozen=True)
class TuneSession:
    """Candidates of a configuration, and settings for measuring them.

    Attributes:
        choices: the candidates, the one with the fastest prediction first.
        num_refused: number of layouts that a rule of the configuration refuses.
        num_steps: timed steps, after `WARM_UP_STEPS` more.
        limit_s: time limit of a run in seconds.
        resources: cores, memory and GPUs of the processes.
        prepared: the data that the trial has prepared.
        folder: folder for plans and logs.
        num_devices: number of processes of each run.
        device: name of the device of each.
    """

    choices: Sequence[Choice]
    num_refused: int
    num_steps: int
    limit_s: float
    resources: Resources
    prepared: Mapping[str, Any]
    folder: Path
    num_devices: int
    device: str

    def measure(self, index: int) -> Measured:
        """Train some steps with a candidate, and return their typical time, or the reason why there is none.

        Raises:
            Interrupted: if a signal has ended the processes.
        """
        place = self.folder / f"candidate-{index}"
        try:
            return self._measure(self.choices[index].config, place)
        finally:
            shutil.rmtree(place, ignore_errors=True)

    def _measure(self, config: Config, place: Path) -> Measured:
        from pipekit.plan.decide import decide_run
        from pipekit.plan.run_folder import write_plan
        from pipekit.training.prepare import load_trial
        from pipekit.training.timed_steps import read_timed_steps

        num_steps = WARM_UP_STEPS + self.num_steps
        result = place / "times.json"
        config = config.updated(
            {
                **_LEFT_OUT,
                "run.dir": str(place / "run"),
                "train.steps": max(config.train.steps, num_steps) if config.train.has_steps else num_steps,
            }
        )
        resources = replace(self.resources, world_size=self.num_devices)
        try:
            with ending_at_once(lambda: "ended before the run began"), _without_warnings():
                plan = decide_run(config, load_trial(config), resources, prepared=self.prepared).plan
                plan_file = write_plan(plan).plan
            task = (TIMING_TASK, str(num_steps), str(result))
            run_plan(
                plan,
                plan_file,
                *task,
                log_dir=place / "logs",
                stdout_rank=-1,
                limit_s=self.limit_s,
                is_last=False,
            )
        except PipekitError as error:
            return _failed(error)
        timed = read_timed_steps(result)
        return Measured(typical_step_s(timed.step_times_s), peak_bytes=timed.peak_bytes)


def typical_step_s(step_times_s: Sequence[float]) -> float:
    """First quartile of the step times after the warm-up.

    A step is never faster than the candidate allows, but other work on the machine slows some of them down.

    Example:
        >>> typical_step_s([9.0, 9.0, 9.0, 1.1, 1.0, 7.0, 8.0, 1.2])
        1.1
    """
    return float(np.quantile(step_times_s[WARM_UP_STEPS:], 0.25))


@contextmanager
def _without_warnings() -> Iterator[None]:
    """Suppress warnings of a configuration, which were already shown when the data were prepared."""
    logger = logging.getLogger("pipekit")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _failed(error: PipekitError) -> Measured:
    """Result of a failed run for the search."""
    text = str(error)
    ran_out = isinstance(error, LayoutError) and "memory" in text
    if isinstance(error, RankError):
        failure = error.failure
        text = describe_failure(failure, names_log=False)
        said = text if failure.report is None else failure.report.traceback
        # Linux kills a process that takes too much memory.
        killed = failure.report is None and failure.returncode == -signal.SIGKILL
        ran_out = killed or any(words in said for words in _OUT_OF_MEMORY)
    elif isinstance(error, HangError):
        text = f"ranks waited too long for each other: {text}"
    return Measured(None, "memory" if ran_out else "other", text.splitlines()[0])


@contextmanager
def open_session(
    config: Config,
    *,
    num_devices: int | None,
    max_tp: int,
    fixed: Sequence[str],
    num_steps: int,
    limit_s: float,
    tell: ProgressCallback | None = None,
) -> Iterator[TuneSession]:
    """Prepare the data, plan the candidates, and yield them; the files of their runs are removed in the end.

    Args:
        config: the user's configuration.
        num_devices: number of processes; None starts one per GPU, or on a CPU one per core.
        max_tp: largest tensor-parallel degree.
        fixed: keys that are not tuned, see `parse_fixed`.
        num_steps: timed steps in each run.
        limit_s: time limit of a run in seconds.
        tell: function that receives progress messages; None writes them to stderr.

    Raises:
        LaunchError: if another launcher has started this process.
        PipekitError: if nothing fits.
    """
    if (ranks := detect_ranks(os.environ)) is not None:
        raise LaunchError(
            f"pipekit tune starts the processes itself, but {ranks.launcher} has started this one; run pipekit tune "
            "without another launcher"
        )
    values = parse_fixed(config, fixed)
    resources = find_resources(os.environ, config, asks_gpu=True)
    number = num_devices or resources.num_devices
    if resources.num_gpus is not None and number > resources.num_gpus:
        raise LayoutError(
            f"--devices {number}: runs are measured on GPUs, and there are {resources.num_gpus}; try --devices "
            f"{resources.num_gpus}"
        )
    check_process_count(number, "--devices")
    with ending_at_once(lambda: "nothing has been measured yet"):
        from pipekit.plan.decide import build_specs
        from pipekit.plan.device import present_device
        from pipekit.plan.search import search, tp_degrees
        from pipekit.training.prepare import load_trial

        trial = load_trial(config)
        prepared = trial.prepare(config, tell or ProgressLines.on_stderr())
        resolved, specs = build_specs(config, trial, prepared)
        device = present_device(resources, number)
        _, found = search(
            resolved,
            specs,
            trial,
            num_devices=number,
            device=device,
            is_gpu=bool(resources.num_gpus),
            tp=tp_degrees(max(max_tp, values.get("parallel.tp", 1)), device),
            zero=ZERO_STAGES,
            num_ranked=10_000,
        )
        choices, num_refused = list_choices(config, found, values)
    with tempfile.TemporaryDirectory(prefix="pipekit-tune-", ignore_cleanup_errors=True) as folder:
        yield TuneSession(
            choices, num_refused, num_steps, limit_s, resources, prepared, Path(folder), number, device.name
        )
