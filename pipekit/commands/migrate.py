"""`pipekit migrate`: a checkpoint that DeepSpeed wrote becomes one of pipekit's."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pipekit.commands.shared_options import ModelConfigFile


def command(
    source: Annotated[
        Path, typer.Argument(help="The folder that DeepSpeed saved into, or that of a tag.", show_default=False)
    ],
    run: Annotated[Path, typer.Argument(help="The folder of the run to write.", show_default=False)],
    rename: Annotated[
        list[str] | None,
        typer.Option(metavar="OLD=NEW", help="Another name of a layer or module, such as layers.0=embed; repeatable."),
    ] = None,
    config: ModelConfigFile = None,
) -> None:
    """Write a checkpoint of DeepSpeed's as one of pipekit's, without running code that it holds."""
    from pipekit.checkpoint.migrate import migrate
    from pipekit.errors import CheckpointError

    renames = {}
    for text in rename or ():
        old, _, new = text.partition("=")
        if not old or not new:
            raise CheckpointError(f"--rename {text}: must be OLD=NEW, for example layers.0=embed")
        renames[old] = new
    found = migrate(source, run, renames=renames, config=config)
    elements = sum(tensor.numel() for tensor in found.tensors.values())
    typer.echo(
        f"wrote {found.path}: step {found.training.step}, {len(found.tensors):,} tensors of {elements:,} elements"
    )
    typer.echo(f"optimizer states: {', '.join(found.states) or 'none'}")
    for note in found.notes:
        typer.echo(f"note: {note}")
