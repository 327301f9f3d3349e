"""`pipekit verify`: a model under every layout that fits, compared with one process that uses torch alone."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from pipekit.commands.shared_options import AsJson, ConfigFile, Overrides, TrustCode


def command(
    config: ConfigFile,
    overrides: Overrides = None,
    steps: Annotated[int, typer.Option(min=1, help="Updates under each layout.")] = 3,
    devices: Annotated[
        int | None,
        typer.Option(
            min=1, help="Processes that may run at once; the GPUs present, or 4, if left out.", show_default=False
        ),
    ] = None,
    layouts: Annotated[
        str | None,
        typer.Option(
            help="Layouts to run, such as pp2,dp2xzero0,pp2xtp2; the configuration's own and small ones if left out.",
            show_default=False,
        ),
    ] = None,
    tolerance: Annotated[float, typer.Option(min=0.0, help="Largest relative difference.")] = 1e-4,
    as_json: AsJson = False,
    trust_code: TrustCode = False,
    keep: Annotated[
        Path | None,
        typer.Option(help="Keep what was recorded, and the logs, in this folder.", show_default=False),
    ] = None,
) -> None:
    """Run a few steps of a model under every layout that fits and in one process, and name the first layer that
    differs."""
    from pipekit.commands.verify_session import verify_config
    from pipekit.config.sources import read_config

    found = verify_config(
        read_config(config, overrides or [], trust_code=trust_code),
        num_steps=steps,
        num_devices=devices,
        layouts=layouts,
        tolerance=tolerance,
        keep=keep,
    )
    if as_json:
        sys.stdout.write(json.dumps(found, indent=1) + "\n")
    else:
        from pipekit.commands.verify_tables import show_report
        from pipekit.training.console import make_console

        show_report(found, make_console())
    if not found["agrees"]:
        raise typer.Exit(1)
