"""`pipekit migrate`: conversion of a DeepSpeed checkpoint to pipekit's format."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pipekit.commands.shared_options import ModelConfigFile


def command(
    source: Annotated[
        Path, typer.Argument(help="Folder that DeepSpeed saved to, or the folder of a tag in it.", show_default=False)
    ],
    run: Annotated[Path, typer.Argument(help="Folder of the run to write.", show_default=False)],
    rename: Annotated[
        list[str] | None,
        typer.Option(metavar="OLD=NEW", help="New name for a layer or module, such as layers.0=embed; repeatable."),
    ] = None,
    config: ModelConfigFile = None,
) -> None:
    """Convert a DeepSpeed checkpoint to pipekit's format.

    Code that the checkpoint contains is never run.
    """
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
