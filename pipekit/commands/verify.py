"""`pipekit verify`: comparison of a model under every layout that fits with one process in plain torch."""

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
    steps: Annotated[int, typer.Option(min=1, help="Steps to train with each layout.")] = 3,
    devices: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Maximum number of processes; by default the GPUs, or on CPUs as many as the configuration needs and "
            "at least 4.",
            show_default=False,
        ),
    ] = None,
    layouts: Annotated[
        str | None,
        typer.Option(
            help="Layouts to run, such as pp2,dp2xzero0,pp2xtp2; by default the configuration's and small ones.",
            show_default=False,
        ),
    ] = None,
    tolerance: Annotated[float, typer.Option(min=0.0, help="Largest relative difference to accept.")] = 1e-4,
    as_json: AsJson = False,
    trust_code: TrustCode = False,
    keep: Annotated[
        Path | None,
        typer.Option(help="Keep the recordings and logs in this folder.", show_default=False),
    ] = None,
) -> None:
    """Check that a model trains the same under every layout.

    Trains a few steps under each layout that fits and in one process, and names the first layer that differs.
    """
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
