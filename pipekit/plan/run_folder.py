"""The folder of a run: what lies where, and whether a configuration may go on in it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipekit.checkpoint.manifest import (
    CHECKPOINTS_FOLDER,
    CONFIG_FILE,
    Manifest,
    find_latest,
    list_checkpoints,
    load_manifest,
    resolve_checkpoint,
)
from pipekit.config import Config, conflicting_keys, load_config
from pipekit.errors import CheckpointError, ConfigError
from pipekit.files import write_atomically
from pipekit.plan.plan import Plan, StartPoint
from pipekit.schedules import write_csv


@dataclass(frozen=True)
class RunFolder:
    """Folder of a run, and its files.

    Attributes:
        path: the folder, `run.dir`.
    """

    path: Path

    @property
    def config(self) -> Path:
        """The resolved configuration, which itself trains."""
        return self.path / CONFIG_FILE

    @property
    def plan(self) -> Path:
        """The plan, which the ranks read."""
        return self.path / "plan.json"

    @property
    def checkpoints(self) -> Path:
        """The checkpoints, and `latest`, which names the newest."""
        return self.path / CHECKPOINTS_FOLDER

    @property
    def metrics(self) -> Path:
        """One JSON object a line for each step."""
        return self.path / "metrics.jsonl"

    @property
    def logs(self) -> Path:
        """Logs of the ranks: `rank-<rank>.log`."""
        return self.path / "logs"

    @property
    def profile(self) -> Path:
        """Pictures of what each rank of the pipeline does when."""
        return self.path / "profile"

    @property
    def schedule(self) -> Path:
        """The pipeline's table, as a CSV file."""
        return self.path / "schedule.csv"

    @property
    def tensorboard(self) -> Path:
        """TensorBoard's event files."""
        return self.path / "tensorboard"


def find_start(config: Config) -> StartPoint | None:
    """The checkpoint that a run goes on from, or None where it starts anew. Reads, and writes nothing.

    Raises:
        ConfigError: if the run folder holds a run of another model or other data, or one that `checkpoint.resume=never`
            would overwrite.
        CheckpointError: if the checkpoint to go on from is missing or cut short.
    """
    folder = RunFolder(Path(config.run.dir))
    resume = config.checkpoint.resume
    if folder.path.exists() and not folder.path.is_dir():
        raise ConfigError(f"run.dir={config.run.dir} is a file; give a folder, or a name that is free")
    if folder.config.is_file():
        _check_same_run(folder.config, config, f"run.dir={config.run.dir} holds a run of another configuration")
    existing = list_checkpoints(folder.checkpoints)
    if resume == "never":
        if existing:
            raise ConfigError(
                f"checkpoint.resume=never would overwrite the {len(existing)} checkpoints in {folder.checkpoints}; "
                "give another run.dir, or go on from them with checkpoint.resume=auto"
            )
        return None
    checkpoint = find_latest(folder.checkpoints) if resume == "auto" else resolve_checkpoint(Path(resume))
    if checkpoint is None:
        return None
    manifest = load_manifest(checkpoint)
    if resume != "auto":
        _check_same_run(checkpoint / CONFIG_FILE, config, f"checkpoint.resume={resume} is of another configuration")
    return StartPoint(checkpoint, manifest.training.step)


def check_data(manifest: Manifest, fingerprint: str, *, where: Path) -> None:
    """Check that the data are those that a checkpoint's position counts.

    Args:
        manifest: the checkpoint's.
        fingerprint: of the data.
        where: the checkpoint's folder, for the message.

    Raises:
        CheckpointError: if they are not.
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

    Raises:
        ConfigError: if the folder cannot be written, or the trial has prepared something that JSON cannot hold.
    """
    folder = RunFolder(Path(plan.config.run.dir))
    text = plan.to_json()
    try:
        folder.path.mkdir(parents=True, exist_ok=True)
        write_atomically(folder.config, plan.config.to_yaml())
        if plan.layout.pp > 1:
            write_csv(plan.schedule, folder.schedule)
        write_atomically(folder.plan, text)
    except OSError as error:
        raise ConfigError(
            f"run.dir={folder.path}: cannot be written: {error.strerror or error}; give a folder that can"
        ) from error
    return folder


def read_plan(path: Path) -> Plan:
    """Read a plan that `write_plan` has written.

    Raises:
        ConfigError: if it is no plan of this version of pipekit.
    """
    return Plan.from_json(path.read_text(encoding="utf-8"), where=str(path))


def trim_metrics(path: Path, last_step: int) -> None:
    """Drop the metrics of steps after `last_step`, which a run that goes on from there does again."""
    if not path.is_file():
        return
    kept = [line for line in path.read_text().splitlines() if (record := _parse(line)) and record["step"] <= last_step]
    write_atomically(path, "".join(f"{line}\n" for line in kept))


def _parse(line: str) -> dict[str, Any] | None:
    # The last line of a killed run may be cut short.
    try:
        record: dict[str, Any] = json.loads(line)
    except ValueError:
        return None
    return record


def _check_same_run(saved: Path, config: Config, what: str) -> None:
    keys = conflicting_keys(load_config(saved), config)
    if keys:
        shown = ", ".join(keys[:4]) + (f" and {len(keys) - 4} more" if len(keys) > 4 else "")
        raise ConfigError(
            f"{what}: {shown} differ{'s' if len(keys) == 1 else ''} from {saved}; give another run.dir to start a new "
            "run, or set them as they are there to go on"
        )
