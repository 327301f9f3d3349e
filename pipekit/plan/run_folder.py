"""The folder of a run: what lies where, and whether a configuration may go on in it."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from pipekit.checkpoint.manifest import (
    CHECKPOINTS_FOLDER,
    CONFIG_FILE,
    Manifest,
    checkpoint_name,
    find_latest,
    find_whole,
    list_checkpoints,
    load_manifest,
    resolve_checkpoint,
)
from pipekit.checkpoint.retention import remove_leftovers
from pipekit.config import Config, conflicting_keys, load_stored_config
from pipekit.errors import CheckpointError, ConfigError
from pipekit.files import write_atomically
from pipekit.hangs.monitor import REPORT_FILE, STALLS_FILE
from pipekit.plan.plan import Plan, StartPoint
from pipekit.schedules import write_csv
from pipekit.storage import storing


class RunFolder:
    """Folder of a run, and its files.

    Attributes:
        path: the folder, `run.dir`.
        config: the resolved configuration, which itself trains.
        plan: the plan, which the ranks read.
        checkpoints: the checkpoints, and `latest`, which names the newest.
        metrics: one JSON object a line for each step.
        spikes: one JSON object a line for each spike of the loss.
        samples: one JSON object a line for each text that a model has generated while it was trained.
        evaluations: one JSON object a line for each evaluation on other texts and on tasks.
        events: one JSON object a line for each start, checkpoint, warning, return to a checkpoint, and end.
        failures: one JSON object a line for each rank that was lost or hung.
        stalls: one JSON object a line for each time that a step stalled, or a rank did not answer.
        records: all of these files of JSON lines.
        report: the run's page.
        logs: logs of the ranks, `rank-<rank>.log`.
        profile: pictures of what each rank of the pipeline does when.
        schedule: the pipeline's table, as a CSV file.
        tensorboard: TensorBoard's event files.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.config = self.path / CONFIG_FILE
        self.plan = self.path / "plan.json"
        self.checkpoints = self.path / CHECKPOINTS_FOLDER
        self.metrics = self.path / "metrics.jsonl"
        self.spikes = self.path / "spikes.jsonl"
        self.samples = self.path / "samples.jsonl"
        self.evaluations = self.path / "evaluations.jsonl"
        self.events = self.path / "events.jsonl"
        self.failures = self.path / "failures.jsonl"
        self.logs = self.path / "logs"
        self.stalls = self.logs / STALLS_FILE
        self.records = (
            self.metrics,
            self.spikes,
            self.samples,
            self.evaluations,
            self.events,
            self.failures,
            self.stalls,
        )
        self.report = self.path / "report.html"
        self.profile = self.path / "profile"
        self.schedule = self.path / "schedule.csv"
        self.tensorboard = self.path / "tensorboard"


def find_start(config: Config) -> StartPoint | None:
    """The checkpoint that a run goes on from, or None where it starts anew. Reads, and writes nothing.

    Where the newest is damaged, it is an earlier one, with a warning. From a checkpoint in which nothing has been
    trained, such as that of an imported model, a run takes the model alone: its data and everything else may be others.

    Raises:
        ConfigError: if the run folder holds checkpoints of another model or other data, or checkpoints that
            `checkpoint.resume=never` would overwrite, or if a folder has the name of one of its files, or a file that
            of one of its folders.
        CheckpointError: if the checkpoint to go on from is missing or cut short.
    """
    folder = RunFolder(config.run.dir)
    resume = config.checkpoint.resume
    check_run_folder(folder)
    existing = list_checkpoints(folder.checkpoints)
    # A start that has trained nothing, or kept nothing, does not stand in the way of another.
    if existing and folder.config.is_file():
        what = f"run.dir={config.run.dir} holds a run of another configuration"
        is_untrained = existing == [folder.checkpoints / checkpoint_name(0)]
        _check_same_run(folder.config, config, what, model_alone=is_untrained)
    if resume == "never":
        if existing:
            raise ConfigError(
                f"checkpoint.resume=never would overwrite the {len(existing)} checkpoints in {folder.checkpoints}; "
                "give another run.dir, or go on from them with checkpoint.resume=auto"
            )
        return None
    if resume == "auto":
        found = find_whole(folder.checkpoints)
        return None if found is None else StartPoint(found[0], found[1].training.step, found[2])
    checkpoint = resolve_checkpoint(Path(resume))
    manifest = load_manifest(checkpoint)
    step = manifest.training.step
    what = f"checkpoint.resume={resume} is of another configuration"
    # The data of a training loop of the user's own are not known.
    _check_same_run(
        checkpoint / CONFIG_FILE, config, what, model_alone=step == 0 or bool(manifest.training.client_state)
    )
    return StartPoint(checkpoint, step)


def check_run_folder(folder: RunFolder) -> None:
    """Check that no folder has the name of a file that a run writes, and no file that of one of its folders.

    Raises:
        ConfigError: if not.
    """
    for path in (folder.path, folder.checkpoints, folder.logs, folder.profile, folder.tensorboard):
        if os.path.lexists(path) and not path.is_dir():
            what = f"run.dir={path}" if path == folder.path else f"{path}"
            raise ConfigError(
                f"{what} is a file, and a run needs a folder of that name; remove it, or give another run.dir"
            )
    for path in (folder.config, folder.plan, folder.schedule, folder.report, *folder.records):
        if os.path.lexists(path) and not path.is_file():
            raise ConfigError(
                f"{path} is no file, and a run writes one of that name; remove it, or give another run.dir"
            )


def describe_progress(run_dir: str | Path) -> str:
    """Progress of a run that is stopped before its ranks could save, as one line about its newest checkpoint."""
    newest = None
    with suppress(CheckpointError, OSError):
        newest = find_latest(RunFolder(run_dir).checkpoints)
    return "nothing was saved yet" if newest is None else f"the newest checkpoint is {newest}"


def check_data(manifest: Manifest, fingerprint: str, *, where: Path) -> None:
    """Check that the data, of which `fingerprint` is the hash, are those that a checkpoint's position counts.

    Raises:
        CheckpointError: if they are not; the message names the checkpoint's folder, `where`.
    """
    stored = manifest.training.data_fingerprint
    if stored and stored != fingerprint:
        raise CheckpointError(
            f"{where}: was trained on other data: the tokens of data.source have changed since (another text, "
            "tokenizer or Python version), and its position in them means nothing now; restore them, or start anew "
            "with another run.dir"
        )


def write_plan(plan: Plan) -> RunFolder:
    """Write a plan into its run folder: `plan.json`, its configuration, and the table of a pipeline.

    Files that a run of another configuration left there are removed if it wrote no checkpoint.

    Raises:
        StorageError: if the folder cannot be written.
        ConfigError: if the trial has prepared something that JSON cannot hold.
    """
    folder = RunFolder(plan.config.run.dir)
    text = plan.to_json()
    with storing(f"run.dir={folder.path}"):
        _remove_other_start(folder, plan.config)
        folder.schedule.unlink(missing_ok=True)
    write_config(folder, plan.config.to_yaml())
    with storing(f"run.dir={folder.path}"):
        if plan.layout.pp > 1:
            write_csv(plan.schedule, folder.schedule)
        write_atomically(folder.plan, text)
    return folder


def adopt_config(folder: RunFolder) -> None:
    """Copy the configuration of the newest checkpoint into a run folder that has none of its own.

    Raises:
        StorageError: if it cannot be read or written.
    """
    with suppress(CheckpointError), storing(folder.path):
        newest = find_latest(folder.checkpoints)
        if newest is not None and (newest / CONFIG_FILE).is_file() and not os.path.lexists(folder.config):
            write_atomically(folder.config, (newest / CONFIG_FILE).read_bytes())


def write_config(folder: RunFolder, text: str) -> None:
    """Make a run folder, remove what interrupted writes have left in it, and write its configuration.

    Raises:
        StorageError: if it cannot be written.
    """
    with storing(f"run.dir={folder.path}"):
        folder.path.mkdir(parents=True, exist_ok=True)
        remove_leftovers(folder.checkpoints)
        for path in folder.path.glob(".*.tmp"):
            if path.is_file():
                path.unlink()
        write_atomically(folder.config, text)


def _remove_other_start(folder: RunFolder, config: Config) -> None:
    """Remove files of a run of another configuration that would be taken for this run's.

    Only files with the names that a run gives them are removed; the folder may hold others.
    """
    if list_checkpoints(folder.checkpoints) or not (folder.config.is_file() and folder.plan.is_file()):
        return
    with suppress(ConfigError):
        stored = load_stored_config(folder.config)
        if stored is None or not conflicting_keys(stored, config):
            return
    logs = [*folder.logs.glob("rank-*.log"), folder.logs / REPORT_FILE]
    profiled = ("step-*.*", "actions.*", "flops.json", "timeline.json", "memory-rank-*.*", "trace-rank-*.json")
    others = [path for pattern in profiled for path in folder.profile.glob(pattern)]
    others += [*folder.tensorboard.glob("events.out.tfevents.*")]
    for path in (folder.plan, folder.report, *folder.records, *logs, *others):
        if path.is_file():
            path.unlink()


def read_plan(path: Path) -> Plan:
    """Read a plan that `write_plan` has written.

    Raises:
        ConfigError: if it is no plan of this version of pipekit.
        StorageError: if it cannot be read.
    """
    with storing(path, doing="read"):
        return Plan.from_json(path.read_text(encoding="utf-8"), where=str(path))


def read_records(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """Lines of a file of JSON lines that are records with a step, and the records; other lines are passed over."""
    return [(line, record) for line, record in read_objects(path) if isinstance(record.get("step"), int)]


def read_objects(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """Lines of a file of JSON lines that are objects, and the objects; other lines are passed over."""
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    return [(line, value) for line, value in zip(lines, _read_json(lines), strict=True) if isinstance(value, dict)]


def _read_json(lines: Sequence[str]) -> list[Any]:
    """Values of lines of JSON; None for what is none."""
    with suppress(ValueError, RecursionError):
        # All at once takes a third less time.
        values: list[Any] = json.loads(f"[{','.join(lines)}]")
        if len(values) == len(lines):
            return values
    values = []
    for line in lines:
        value = None
        with suppress(ValueError, RecursionError):  # the last line of a killed run may be cut short
            value = json.loads(line)
        values.append(value)
    return values


def trim_records(path: Path, last_step: int) -> None:
    """Drop the records of steps after `last_step`, which a run that goes on from there writes again; all if it is 0."""
    if path.is_file():
        with storing(path):
            kept = [line for line, record in read_records(path) if last_step > 0 and record["step"] <= last_step]
            write_atomically(path, "".join(f"{line}\n" for line in kept))


def _check_same_run(saved: Path, config: Config, what: str, *, model_alone: bool) -> None:
    stored = load_stored_config(saved)
    keys = [] if stored is None else conflicting_keys(stored, config)
    if model_alone:
        keys = [key for key in keys if key.startswith(("model.", "lora."))]
    if keys:
        shown = ", ".join(keys[:4]) + (f" and {len(keys) - 4} more" if len(keys) > 4 else "")
        raise ConfigError(
            f"{what}: {shown} differ{'s' if len(keys) == 1 else ''} from {saved}; give another run.dir to start a new "
            "run, or set them as they are there to go on"
        )
