"""Schedule tables as CSV files: one row per rank, one action per cell."""

from __future__ import annotations

import csv
from pathlib import Path

from pipekit.errors import ConfigError, ScheduleError
from pipekit.files import read_regular
from pipekit.schedules.action import Action
from pipekit.schedules.schedule import Schedule
from pipekit.schedules.validate import validate

_MAX_BYTES = 16_000_000  # of a million actions


def write_csv(schedule: Schedule, path: str | Path) -> None:
    """Write a schedule table to a CSV file that `read_csv` can read."""
    with Path(path).open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, lineterminator="\n").writerows([str(action) for action in row] for row in schedule.ranks)


def read_csv(path: str | Path) -> Schedule:
    """Read a schedule table from a CSV file, and validate it.

    Each row is a rank and each cell an action, in order; empty cells, empty lines and lines that begin with `#` are
    ignored. The number of micro-batches follows from the highest one.

    Raises:
        ScheduleError: if a cell is not an action, with file, line and column; or if the table cannot be run.
    """
    rows: list[tuple[Action, ...]] = []
    try:
        # Spreadsheets begin a file with a byte order mark, and end it with lines of commas.
        text = read_regular(path, max_bytes=_MAX_BYTES).decode("utf-8-sig")
        for number, line in enumerate(text.splitlines(), start=1):
            cells = next(csv.reader([line]), [])
            if any(cell.strip() for cell in cells) and not line.lstrip().startswith("#"):
                rows.append(_read_row(cells, f"{path}:{number}"))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ScheduleError(f"{path}: cannot be read as a schedule: {reason}") from None
    if not rows:
        raise ScheduleError(f"{path}: holds no action; write one row for each pipeline rank, as in 0F0,0F1,0B0,0B1")
    num_micro_batches = 1 + max(action.micro_batch for row in rows for action in row)
    schedule = Schedule(str(path), num_micro_batches, tuple(rows))
    validate(schedule, channels="nccl")
    return schedule


def _read_row(cells: list[str], where: str) -> tuple[Action, ...]:
    actions = []
    for column, cell in enumerate(cells, start=1):
        try:
            if cell.strip():
                actions.append(Action.parse(cell))
        except ConfigError as error:
            raise ScheduleError(f"{where}: column {column}: {error}") from None
    return tuple(actions)
