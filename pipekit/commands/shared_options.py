"""Arguments and options that several commands have."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

ConfigFile = Annotated[Path, typer.Argument(help="YAML file of the run.", show_default=False)]

Overrides = Annotated[
    list[str] | None, typer.Argument(help="Changes, such as train.steps=20 parallel.pp=1.", show_default=False)
]

ModelConfigFile = Annotated[
    Path | None,
    typer.Option("--config", metavar="FILE", help="YAML file whose model section describes what a script trained."),
]

TrustCode = Annotated[
    bool, typer.Option("--trust-code", help="Run the code that a stored configuration names, such as model.builder.")
]

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
