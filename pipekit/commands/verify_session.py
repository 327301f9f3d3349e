"""Verification of one layout after the other against a reference in one process."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipekit.config import Config
from pipekit.errors import ConfigError, LaunchError, LayoutError, PipekitError
from pipekit.launch.failures import RankError, describe_failure
from pipekit.launch.local import run_plan
from pipekit.launch.resources import find_resources
from pipekit.layout import Layout
from pipekit.progress import ProgressLines
from pipekit.verify.explain import LayoutContext, show_names
from pipekit.verify.layouts import LayoutCandidate, LayoutLimits, parse_layouts, plan_candidates, select_fitting
from pipekit.verify.measurement import MEASUREMENTS_FILE, load_measurements
from pipekit.verify.report import Result, report

if TYPE_CHECKING:
    from pipekit.layers.specs import LayerSpec
    from pipekit.plan.resources import Resources

_DEFAULT_CPU_DEVICES = 4
_TRACEBACK_LINES = 6
# Keys that apply only to the configuration's own layout.
_OWN_KEYS: dict[str, Any] = {
    "parallel.partition": "parameters",
    "parallel.boundaries": None,
    "parallel.stages_per_rank": None,
    "parallel.max_in_flight": None,
}


def verify_config(
    config: Config,
    *,
    num_steps: int,
    num_devices: int | None,
    layouts: str | None,
    tolerance: float,
    keep: Path | None,
) -> dict[str, Any]:
    """Run a configuration's model in one process and under each layout, and return the report.

    Args:
        config: the configuration.
        num_steps: steps to train with each layout.
        num_devices: maximum number of processes; None takes the number of GPUs, or on CPUs as many as the
            configuration needs and at least four.
        layouts: the layouts to run, such as `pp2,pp2xdp2`; None takes the configuration's and small ones.
        tolerance: the largest relative difference to accept.
        keep: folder to keep recordings and logs in; None keeps nothing.

    Raises:
        PipekitError: if the model does not run in one process, or no layout fits.
    """
    from pipekit.layers.specs import TiedLayerSpec, layer_names

    resources = find_resources(os.environ, config)
    num_gpus = resources.num_gpus
    tell = ProgressLines.on_stderr()
    config, specs, prepared = _prepare_model(config, tell)
    num_devices = num_devices or num_gpus or max(_own_layout(config, None).world_size, _DEFAULT_CPU_DEVICES)
    if num_gpus is not None and num_devices > num_gpus:
        raise LayoutError(f"--devices {num_devices}: there are {num_gpus} GPUs; try --devices {num_gpus}")
    own = _own_layout(config, num_devices if num_gpus else None)
    fitting, rejected = _choose(config, specs, own, num_devices, layouts)
    if not fitting:
        reasons = "\n  ".join(f"{candidate}: {reason}" for candidate, reason in rejected)
        raise LayoutError(f"no layout fits {num_devices} devices, so there is nothing to verify:\n  {reasons}")
    config, notes = _comparable(config, fitting)
    names = layer_names(specs)
    tied = frozenset(name for name, spec in zip(names, specs, strict=True) if isinstance(spec, TiedLayerSpec))
    results = []
    with _working_folder(keep) as folder:
        session = _Session(folder, prepared, resources, num_steps, tolerance, tell)
        random_layers = session.run_reference(_config_of(config, LayoutCandidate(Layout(), 0)))
        if random_layers and any(candidate.layout.tp > 1 for candidate in fitting):
            notes.append(
                f"these layers draw random numbers: {show_names(random_layers)}; numbers for a tensor-parallel rank's "
                "part of an activation (sharded_randomness) differ by design from those in one process, so verify "
                "without dropout"
            )
        for candidate in fitting:
            try:
                candidate_config = _config_of(config, candidate)
            except ConfigError as error:
                rejected.append((candidate, str(error).splitlines()[0]))
                continue
            results.append(session.run_candidate(candidate, candidate_config, names, tied, keeps=keep is not None))
    if not results:
        raise LayoutError("\n  ".join(["no layout can run:", *(f"{place}: {reason}" for place, reason in rejected)]))
    trial = f", {config.run.trial}" if config.run.trial else ""
    return report(
        results,
        rejected=rejected,
        notes=notes,
        model=f"{config.model.description}{trial}, {len(specs)} layers",
        device="cuda" if num_gpus else "cpu",
        precision="fp32",
        steps=num_steps,
        global_batch_size=config.train.global_batch_size,
        tolerance=tolerance,
    )


@dataclass(frozen=True)
class _Session:
    """Runs of a verification, one layout after the other."""

    folder: Path
    prepared: Mapping[str, Any]
    resources: Resources
    num_steps: int
    tolerance: float
    tell: ProgressLines

    @property
    def reference(self) -> Path:
        return self.folder / "reference"

    def run_reference(self, config: Config) -> list[str]:
        """Record the reference for every layout, and return the layers that draw random numbers."""
        from pipekit.verify.recording import Recording

        self.tell("running the reference, one process without pipekit's engine")
        try:
            self._run(config, 1, self.reference, reference=None)
        except PipekitError as error:
            text = _failure_text(error, names_rank=False)
            raise LaunchError(f"the reference, one process without pipekit's engine, failed: {text}") from None
        names: list[str] = Recording(self.reference).summaries[0]["random_layers"]
        return names

    def run_candidate(
        self, candidate: LayoutCandidate, config: Config, names: Sequence[str], tied: frozenset[str], *, keeps: bool
    ) -> Result:
        """Run a layout, and return the result."""
        self.tell(f"running {candidate}")
        place = self.folder / str(candidate).replace(" x ", "-").replace("=", "") / f"zero{candidate.zero}"
        started_s = time.perf_counter()
        try:
            self._run(config, candidate.layout.world_size, place, reference=self.reference)
        except PipekitError as error:
            return Result(candidate, time.perf_counter() - started_s, failure=_failure_text(error))
        measurements, boundaries = load_measurements(place / MEASUREMENTS_FILE)
        time_s = time.perf_counter() - started_s
        if not keeps:
            shutil.rmtree(place, ignore_errors=True)
        return Result(candidate, time_s, measurements, LayoutContext(candidate.layout, names, boundaries, tied))

    def _run(self, config: Config, world_size: int, place: Path, *, reference: Path | None) -> None:
        from pipekit.plan.decide import decide_run
        from pipekit.plan.run_folder import write_plan
        from pipekit.training.prepare import load_trial
        from pipekit.verify.run import Task

        place.mkdir(parents=True)
        config = config.updated({"run.dir": str(place / "run")})
        resources = replace(self.resources, world_size=world_size)
        plan = decide_run(config, load_trial(config), resources, prepared=self.prepared, on_progress=self.tell).plan
        task = Task(str(place), self.num_steps, self.tolerance, None if reference is None else str(reference))
        plan_file, log_dir = write_plan(plan).plan, place / "logs"
        run_plan(plan, plan_file, json.dumps(asdict(task)), log_dir=log_dir, stdout_rank=-1, is_last=False)


def _failure_text(error: PipekitError, *, names_rank: bool = True) -> str:
    """Message of a failure, without the path of its log, which is removed."""
    if isinstance(error, RankError):
        return describe_failure(error.failure, names_rank=names_rank, names_log=False)
    return str(error)


def _prepare_model(config: Config, tell: ProgressLines) -> tuple[Config, Sequence[LayerSpec], Mapping[str, Any]]:
    """Prepare the data, and return the configuration with all sizes, the model, and the prepared data."""
    from pipekit.plan.decide import build_specs
    from pipekit.training.prepare import load_trial

    try:
        trial = load_trial(config)
        prepared = trial.prepare(config, tell)
        return *build_specs(config, trial, prepared), prepared
    except PipekitError:
        raise
    except Exception as error:
        text = "".join(traceback.format_exception(error))
        lines = [line for line in text.splitlines() if line.strip(" ~^")][-_TRACEBACK_LINES:]
        raise ConfigError("\n".join(["the model cannot be built:", *lines])) from error


def _choose(
    config: Config, specs: Sequence[LayerSpec], own_layout: Layout, num_devices: int, named: str | None
) -> tuple[list[LayoutCandidate], list[tuple[LayoutCandidate, str]]]:
    from pipekit.layers.specs import flow_of_spec

    parallel, train = config.parallel, config.train
    holds_parts = parallel.sequence_parallel and any(flow_of_spec(spec).works_on_shard for spec in specs)
    limits = LayoutLimits(
        num_layers=len(specs),
        heads=config.model.attention_heads,
        sequence_length=train.sequence_length if holds_parts else None,
        global_batch_size=train.global_batch_size,
        micro_batch_size=train.micro_batch_size,
    )
    if named is not None:
        candidates = parse_layouts(named, zero=parallel.zero, order=parallel.order)
        return select_fitting(candidates, num_devices, limits)
    own = None if parallel.auto else LayoutCandidate(own_layout, parallel.zero, is_configured=True)
    return plan_candidates(num_devices, limits, own=own, zero=parallel.zero, order=parallel.order)


def _own_layout(config: Config, num_gpus: int | None) -> Layout:
    """Layout of the configuration, even if there are too few GPUs for it; `dp: auto` fills the GPUs."""
    parallel = config.parallel
    filled = max(1, (num_gpus or 0) // (parallel.pp * parallel.tp))
    dp = filled if parallel.dp == "auto" else parallel.dp
    return Layout(pp=parallel.pp, dp=dp, tp=parallel.tp, order=parallel.order)


def _comparable(config: Config, candidates: Sequence[LayoutCandidate]) -> tuple[Config, list[str]]:
    """Configuration that every layout runs, and notes on its changes."""
    notes = []
    changes: dict[str, Any] = {
        "train.precision": "fp32",
        "train.eval_interval": None,
        "checkpoint.resume": "never",
        "logging.wandb": None,
        "logging.tensorboard": False,
        "logging.trackio": None,
        "profile.steps": 0,
    }
    if config.train.precision not in ("fp32", "auto"):
        notes.append(
            f"train.precision={config.train.precision} was replaced by fp32, in which rounding hides no differences"
        )
    for key in ("curriculum", "batch_warmup", "layer_drop"):
        if getattr(config.train, key) is not None:
            changes[f"train.{key}"] = None
            notes.append(f"train.{key} was turned off: layouts are compared on whole batches through every block")
    shares_layers = any(candidate.layout.tp > 1 for candidate in candidates)
    for key, dropout in config.model.dropouts.items() if shares_layers else ():
        changes[key] = 0.0
        notes.append(
            f"{key}={dropout:g} was set to 0: each tensor-parallel rank draws its own dropout masks, so runs with "
            "tp > 1 draw different masks than one process"
        )
    return config.updated(changes), notes


def _config_of(config: Config, candidate: LayoutCandidate) -> Config:
    """Configuration with a layout; it keeps its schedule if that runs with the layout.

    Raises:
        ConfigError: if the layout cannot run.
    """
    changes: dict[str, Any] = {f"parallel.{name}": degree for name, degree in candidate.degrees.items()}
    changes["parallel.auto"] = False
    if candidate.is_configured:
        return config.updated(changes)
    changes |= _OWN_KEYS
    schedule = config.parallel.schedule
    if candidate.layout.pp == 1 or schedule == "auto" or schedule.endswith(".csv"):
        schedule = "1f1b"
    try:
        return config.updated({**changes, "parallel.schedule": schedule})
    except ConfigError:
        return config.updated({**changes, "parallel.schedule": "1f1b"})


@contextmanager
def _working_folder(keep: Path | None) -> Iterator[Path]:
    """Create a folder for recordings, and remove it at the end unless `keep` names one."""
    if keep is None:
        with tempfile.TemporaryDirectory(prefix="pipekit-verify-", ignore_cleanup_errors=True) as folder:
            yield Path(folder)
        return
    if keep.exists() and (not keep.is_dir() or any(keep.iterdir())):
        raise ConfigError(f"--keep {keep}: already exists; give a new or empty folder")
    keep.mkdir(parents=True, exist_ok=True)
    yield keep.absolute()
