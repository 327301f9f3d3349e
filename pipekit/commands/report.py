"""`pipekit report`: a page about one run, or several side by side."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer


def command(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Folders of runs.", show_default=False)],
    html: Annotated[
        Path | None,
        typer.Option(
            help="Page to write; by default report.html, in the folder of a single run, or here for several.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Write a page about one run, or several side by side.

    It shows curves, timelines, events and samples, and opens offline in any browser. `pipekit train` writes the same
    page during training.
    """
    from pipekit.errors import ConfigError
    from pipekit.pages.run_page import describe, write_run_page
    from pipekit.pages.run_record import RunRecord
    from pipekit.plan.run_folder import RunFolder

    twice = next(
        (run for index, run in enumerate(runs) if run.resolve() in [each.resolve() for each in runs[:index]]), None
    )
    if twice is not None:
        raise ConfigError(f"{twice} is given twice; give each run once")
    records = [RunRecord.read(run) for run in runs]
    page = html or (RunFolder(runs[0]).report if len(runs) == 1 else Path("report.html"))
    write_run_page(records, page)
    for run, record in zip(runs, records, strict=True):
        sys.stdout.write(f"{run}: {describe(record)}\n")
    sys.stdout.write(f"wrote {page}\n")
