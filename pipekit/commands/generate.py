"""`pipekit generate`: text from a trained model."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from pipekit.commands.shared_options import ModelConfigFile, TrustCode


def command(
    source: Annotated[
        Path, typer.Argument(help="A run's folder, one of its checkpoints, or an export.", show_default=False)
    ],
    prompt: Annotated[str, typer.Option(help="Text to go on from.")] = "def ",
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to draw at most.")] = 100,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 takes the likeliest token each time.")] = 0.8,
    top_k: Annotated[int, typer.Option(min=0, help="Draw among so many of the likeliest; 0 among all.")] = 50,
    seed: Annotated[int, typer.Option(help="Of the draws.")] = 0,
    device: Annotated[Literal["auto", "cpu", "cuda"], typer.Option(help="What to compute on.")] = "auto",
    trust_code: TrustCode = False,
    config: ModelConfigFile = None,
) -> None:
    """Sample text from a trained model."""
    from pipekit.config.stored_code import check_stored_code
    from pipekit.errors import printable
    from pipekit.inference.stream_text import stream_text

    if config is not None:
        check_stored_code(config, trust_code=trust_code)
    for piece in stream_text(
        source,
        prompt,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k or None,
        seed=seed,
        device=device,
        trust_code=trust_code,
        config=config,
    ):
        sys.stdout.write(printable(piece) if sys.stdout.isatty() else piece)
        sys.stdout.flush()
    sys.stdout.write("\n")
