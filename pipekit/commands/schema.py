"""`pipekit schema`: the JSON schema of a configuration."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from pipekit.storage import storing


def command(
    out: Annotated[Path | None, typer.Argument(help="File to write; stdout by default.", show_default=False)] = None,
) -> None:
    """Print the JSON schema of a configuration.

    Editors use it to complete and check YAML files.
    """
    from pipekit.config import config_json_schema

    text = json.dumps(config_json_schema(), indent=2) + "\n"
    if out is None:
        sys.stdout.write(text)
    else:
        with storing(out):
            out.write_text(text, encoding="utf-8")
