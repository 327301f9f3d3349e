"""Record of a run, read from its folder: metrics, configuration, layout, events, checkpoints, texts and timelines."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from pipekit.checkpoint.manifest import list_checkpoints
from pipekit.errors import ConfigError
from pipekit.pages.charts import TimedAction
from pipekit.plan.run_folder import RunFolder, read_objects
from pipekit.plan.train_result import TrainResult
from pipekit.run_lock import seems_held
from pipekit.storage import storing


@dataclass(frozen=True)
class Event:
    """Something that happened in a run.

    Attributes:
        time: in UTC, in ISO format; empty where it is not known.
        step: the step after which it happened; None where it is not known.
        kind: `start`, `checkpoint`, `evaluation`, `warning`, `spike`, `rollback`, `stall`, `restart`, `failure`,
            `stop` or `end`.
        text: what happened.
    """

    time: str
    step: int | None
    kind: str
    text: str


@dataclass(frozen=True)
class StepTimelines:
    """Timelines of one profiled step on one pipeline.

    Attributes:
        step: the step.
        measured, planned: the actions of each rank.
        step_time_s, bubble_fraction: of both, by `measured` and `planned`.
    """

    step: int
    measured: Sequence[Sequence[TimedAction]]
    planned: Sequence[Sequence[TimedAction]]
    step_time_s: Mapping[str, float]
    bubble_fraction: Mapping[str, float]


@dataclass(frozen=True)
class RunRecord:
    """Everything that a page shows of a run.

    Attributes:
        name: of its folder.
        result: its metrics.
        config_text: its configuration as YAML; empty where it has none.
        config: the same as plain data.
        plan: `plan.json` as plain data; empty where there is none.
        is_held: whether a process trains in its folder, as far as its lock tells.
        events: in the order of their times.
        spikes: steps and losses of its spikes.
        checkpoints: steps, and bytes, of those that are kept.
        samples: texts that the model has generated, with their steps and prompts.
        evaluations: records of `pipekit eval`.
        timelines: of the newest profiled step; None where nothing was profiled.
        memory_peaks: by rank, the most memory of a profiled step in bytes.
    """

    name: str
    result: TrainResult
    config_text: str
    config: Mapping[str, Any]
    plan: Mapping[str, Any]
    is_held: bool
    events: Sequence[Event]
    spikes: Sequence[tuple[int, float]]
    checkpoints: Sequence[tuple[int, int]]
    samples: Sequence[Mapping[str, Any]]
    evaluations: Sequence[Mapping[str, Any]]
    timelines: StepTimelines | None
    memory_peaks: Mapping[int, int]

    @property
    def num_steps(self) -> int | None:
        """Steps of the whole run; None where its folder does not tell."""
        train = self.config.get("train")
        steps = train.get("steps") if isinstance(train, Mapping) else None
        return steps if isinstance(steps, int) else None

    @property
    def state(self) -> str:
        """State of the run: `finished`, `stopped`, `failed`, `going on` or `interrupted`."""
        last = next((each.kind for each in reversed(self.events) if each.kind in _ENDS), "")
        if last == "end" or (self.num_steps is not None and self.result.step >= self.num_steps):
            return "finished"
        if self.is_held and last not in ("stop", "failure"):
            return "going on"
        return _ENDS.get(last, "interrupted")

    @classmethod
    def read(cls, path: str | Path) -> RunRecord:
        """Read a run that has ended, failed or goes on.

        Raises:
            ConfigError: if the folder is not that of a run.
            StorageError: if its files cannot be read.
        """
        folder = RunFolder(path)
        if not folder.path.is_dir() or not any(each.exists() for each in (folder.config, folder.plan, *folder.records)):
            what = "holds no run" if folder.path.is_dir() else "is no folder"
            raise ConfigError(
                f"{path} {what}; give the folder of a run, which has a config.yaml and a metrics.jsonl and is run.dir "
                "in its configuration"
            )
        with storing(folder.path, doing="read"):
            config_text = folder.config.read_text(encoding="utf-8") if folder.config.is_file() else ""
            spikes = [(each["step"], each.get("loss") or 0.0) for each in _records(folder.spikes) if "step" in each]
            checkpoints = [_checkpoint(each) for each in list_checkpoints(folder.checkpoints)]
            return cls(
                name=Path(os.path.abspath(folder.path)).name,
                result=TrainResult.read(folder.path),
                config_text=config_text,
                config=_mapping(config_text, yaml.safe_load),
                plan=_mapping(folder.plan.read_text(encoding="utf-8"), json.loads) if folder.plan.is_file() else {},
                is_held=seems_held(folder.path),
                events=_events(folder),
                spikes=spikes,
                checkpoints=[each for each in checkpoints if each is not None],
                samples=_records(folder.samples),
                evaluations=_records(folder.evaluations),
                timelines=_timelines(folder),
                memory_peaks=_memory_peaks(folder),
            )


_ENDS = {"start": "interrupted", "stop": "stopped", "failure": "failed", "restart": "failed", "end": "finished"}


def _mapping(text: str, parse: Any) -> Mapping[str, Any]:
    with suppress(ValueError, yaml.YAMLError, RecursionError):
        found = parse(text)
        if isinstance(found, Mapping):
            return found
    return {}


def _records(path: Path) -> list[dict[str, Any]]:
    return [record for _, record in read_objects(path)] if path.is_file() else []


def _events(folder: RunFolder) -> list[Event]:
    found = [
        Event(str(each.get("time", "")), each.get("step"), str(each["event"]), str(each.get("text", "")))
        for each in _records(folder.events)
        if "event" in each
    ]
    told = {event.step for event in found if event.kind == "warning"}
    for each in _records(folder.spikes):
        if each.get("step") not in told:
            score = each.get("score")
            text = f"loss {each.get('loss')}" + (f", {score:.1f} spreads above the last ones" if score else "")
            found.append(Event("", each.get("step"), "spike", text))
    for each in _records(folder.stalls):
        found.append(Event(str(each.get("time", "")), None, "stall", str(each.get("text", ""))))
    for each in _records(folder.failures):
        where = [f"rank {each['rank']}"] if each.get("rank") is not None else []
        where += [f"on {each['host']}"] if each.get("host") else []
        text = f"{each.get('kind', '')} {' '.join(where)}: {each.get('message', '')}; then {each.get('then', '')}"
        kind = "restart" if str(each.get("then", "")).startswith("restart") else "failure"
        found.append(Event(str(each.get("time", "")), None, kind, text))
    # What has no time stands where its step does.
    timed = sorted((event for event in found if event.time), key=lambda event: event.time)
    for event in (event for event in found if not event.time):
        later = [index for index, other in enumerate(timed) if (other.step or 0) > (event.step or 0)]
        timed.insert(later[0] if later else len(timed), event)
    return timed


def _checkpoint(path: Path) -> tuple[int, int] | None:
    digits = path.name.rpartition("-")[2]
    with suppress(OSError):  # one that is removed meanwhile
        if digits.isdecimal():
            return int(digits), sum(file.stat().st_size for file in path.iterdir() if file.is_file())
    return None


def _timelines(folder: RunFolder) -> StepTimelines | None:
    for path in sorted(folder.profile.glob("step-*.json"), reverse=True):
        with suppress(ValueError, KeyError, TypeError):
            both = json.loads(path.read_text(encoding="utf-8"))
            named = {"measured": both["measured"], "planned": both["simulated"]}
            measured, planned = ([list(map(tuple, row)) for row in each["ranks"]] for each in named.values())
            return StepTimelines(
                int(path.stem.rpartition("-")[2]),
                measured,
                planned,
                {name: each["step_time_s"] for name, each in named.items()},
                {name: each["bubble_fraction"] for name, each in named.items()},
            )
    return None


def _memory_peaks(folder: RunFolder) -> dict[int, int]:
    def peaks() -> Iterator[tuple[int, int]]:
        for path in folder.profile.glob("memory-rank-*.json"):
            with suppress(ValueError, KeyError, TypeError):
                pairs = json.loads(path.read_text(encoding="utf-8"))["seconds_and_bytes"]
                yield int(path.stem.rpartition("-")[2]), max(num_bytes for _, num_bytes in pairs)

    return dict(sorted(peaks()))
