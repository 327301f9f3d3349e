"""`pipekit launch`: the processes of a script of one's own."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

# What follows the script is the script's.
CONTEXT_SETTINGS = {"allow_interspersed_args": False}


def command(
    script: Annotated[Path, typer.Argument(help="Python file to run.", show_default=False)],
    arguments: Annotated[list[str] | None, typer.Argument(help="Its arguments.", show_default=False)] = None,
    processes: Annotated[
        int | None,
        typer.Option("--processes", "-n", min=1, help="Number of processes; by default that of the GPUs, or 1."),
    ] = None,
    device: Annotated[Literal["auto", "cpu", "cuda"], typer.Option(help="Device to compute on.")] = "auto",
    log_dir: Annotated[
        Path | None, typer.Option(help="Folder of the logs; by default runs/<name of the script>/logs.")
    ] = None,
) -> None:
    """Run a training script in several processes on this machine, as torchrun does, and end them together."""
    from pipekit.launch.script import launch_script

    launch_script(script, arguments or [], processes=processes or "auto", device=device, log_dir=log_dir)
