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
    prompt: Annotated[str, typer.Option(help="Text to go on from; without it a document begins.")] = "",
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to draw at most.")] = 100,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 takes the likeliest token each time.")] = 0.8,
    top_k: Annotated[int, typer.Option(min=0, help="Draw among so many of the likeliest; 0 among all.")] = 50,
    top_p: Annotated[float, typer.Option(min=0.0, max=1.0, help="Draw among the likeliest of this probability.")] = 1.0,
    stop: Annotated[list[str] | None, typer.Option(help="End before this text; may be given several times.")] = None,
    seed: Annotated[int, typer.Option(help="Of the draws.")] = 0,
    device: Annotated[Literal["auto", "cpu", "cuda"], typer.Option(help="What to compute on.")] = "auto",
    trust_code: TrustCode = False,
    config: ModelConfigFile = None,
) -> None:
    """Sample text from a trained model."""
    from pipekit.config.stored_code import check_stored_code
    from pipekit.inference.generator import Generator
    from pipekit.inference.sample_tokens import Sampling

    sampling = Sampling(temperature, top_k or None, top_p if top_p < 1 else None)
    if config is not None:
        check_stored_code(config, trust_code=trust_code)
    generator = Generator.open(source, device=device, trust_code=trust_code, config=config)
    prompt_ids = generator.encode_prompt(prompt)
    if not generator.has_cache:
        sys.stderr.write(
            "note: the model's layers know no key-value cache; every token computes the whole text again\n"
        )
    _write(prompt)
    for piece in generator.stream(
        [prompt_ids], max_new_tokens=max_new_tokens, sampling=sampling, stop=stop or (), seeds=[seed]
    ):
        _write(piece.text)
    sys.stdout.write("\n")


def _write(text: str) -> None:
    from pipekit.errors import printable

    sys.stdout.write(printable(text) if sys.stdout.isatty() else text)
    sys.stdout.flush()
