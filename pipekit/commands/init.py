"""`pipekit init`: a new configuration file."""

from __future__ import annotations

import sys
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from pipekit.errors import ConfigError
from pipekit.storage import storing


class OffloadTarget(str, Enum):
    """Memory that `--offload` can name."""

    none = "none"
    cpu = "cpu"
    nvme = "nvme"


def command(
    zero: Annotated[int, typer.Option(min=0, max=3, help="ZeRO stage.")] = 1,
    offload: Annotated[
        OffloadTarget, typer.Option(help="Memory for optimizer states, and with ZeRO-3 for weights too.")
    ] = OffloadTarget.none,
    nvme_dir: Annotated[
        str | None, typer.Option(help="Folder for the files of `--offload nvme`.", show_default=False)
    ] = None,
    pp: Annotated[int, typer.Option(min=1, help="Pipeline-parallel degree.")] = 1,
    folder: Annotated[
        Path | None,
        typer.Option("--from", help="Folder of a Hugging Face model to fine-tune.", show_default=False),
    ] = None,
    lora: Annotated[
        int | None,
        typer.Option(min=1, help="Rank of LoRA adapters to train instead of its weights.", show_default=False),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="File to write; stdout by default.", show_default=False)
    ] = None,
) -> None:
    """Write a working configuration with a comment on every key."""
    from pipekit.config.template import config_template

    source = None if folder is None else str(folder)
    text = config_template(zero=zero, offload=offload.value, nvme_dir=nvme_dir, pp=pp, folder=source, lora=lora)
    if out is None:
        sys.stdout.write(text)
        return
    if out.exists():
        raise ConfigError(f"{out}: already exists; remove it, or give another name with -o")
    with storing(out):
        out.write_text(text, encoding="utf-8")
