"""`pipekit completion`: a script for tab completion of commands and options."""

from __future__ import annotations

import io
import sys
from contextlib import redirect_stdout
from typing import Annotated, Literal

import typer


def command(
    context: typer.Context,
    shell: Annotated[Literal["bash", "zsh", "fish"], typer.Argument(help="Your shell.", show_default=False)],
) -> None:
    """Print a script for tab completion of commands and options.

    It also completes file names.
    """
    from typer.completion import shell_complete

    script = io.StringIO()
    with redirect_stdout(script):
        shell_complete(context.find_root().command, {}, "pipekit", "_PIPEKIT_COMPLETE", f"source_{shell}")
    # Arguments are files more often than not.
    sys.stdout.write(script.getvalue().replace(" --no-files", ""))
