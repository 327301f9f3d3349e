"""`pipekit import`: a Hugging Face model as the first checkpoint of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pipekit.commands.shared_options import Overrides


def command(
    source: Annotated[Path, typer.Argument(help="Folder of a Hugging Face model.", show_default=False)],
    run: Annotated[Path | None, typer.Argument(help="Folder of the run to write.", show_default=False)] = None,
    overrides: Overrides = None,
) -> None:
    """Import a Hugging Face model as the first checkpoint of a run.

    Without RUN, print the model's configuration.
    """
    from pipekit.inference.import_model import import_config, import_model
    from pipekit.tensors.host_memory import return_freed_memory

    if run is None:
        typer.echo(import_config(source).to_yaml(), nl=False)
        return
    return_freed_memory()
    checkpoint, config = import_model(source, run, overrides or [])
    typer.echo(f"imported {config.model.description} from {source} as {checkpoint}")
    source_is_given = any(override.startswith("data.source=") for override in overrides or [])
    data = "" if source_is_given else " data.source=YOUR_TEXT"
    typer.echo(f"train it with: pipekit train {run / 'config.yaml'}{data}")
