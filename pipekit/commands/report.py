"""`pipekit report`: the page of a run, or of several side by side."""

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
            help="The page to write; report.html in the folder of a single run if left out, or else here.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Write a page about a run: curves, timelines, events, samples; several runs are shown side by side.

    The page opens offline in any browser. It is written in the same way while `pipekit train` trains.
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
    sys.stdout.write(f"{page} shows {'it' if len(runs) == 1 else 'them'}\n")
