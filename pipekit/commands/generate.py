"""`pipekit generate`: text from a trained model, for a prompt, a file of prompts, or a chat."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from pipekit.commands.shared_options import ModelConfigFile, Stages, TensorRanks, TrustCode


def command(
    source: Annotated[
        Path, typer.Argument(help="Folder of a run, one of its checkpoints, or an export.", show_default=False)
    ],
    prompt: Annotated[
        str | None, typer.Option(help="Text to continue; by default, begin a new document.", show_default=False)
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="File with a prompt per line, text or JSON; prints results as JSON lines.",
            show_default=False,
        ),
    ] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Chat in the terminal, using the chat template.")] = False,
    system: Annotated[str | None, typer.Option(help="System message of the chat.", show_default=False)] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Maximum number of tokens to generate.")] = 100,
    temperature: Annotated[
        float, typer.Option(min=0.0, help="Sampling temperature; 0 always takes the likeliest token.")
    ] = 0.8,
    top_k: Annotated[int, typer.Option(min=0, help="Sample from this many of the likeliest tokens; 0 for all.")] = 50,
    top_p: Annotated[
        float, typer.Option(help="Sample from the likeliest tokens whose probabilities add up to this; 1 for all.")
    ] = 1.0,
    stop: Annotated[
        list[str] | None, typer.Option(help="Stop before this text; repeatable.", show_default=False)
    ] = None,
    seed: Annotated[
        int, typer.Option(min=0, max=2**62, help="Seed of the first prompt; each further prompt has the next seed.")
    ] = 0,
    batch_size: Annotated[int, typer.Option(min=1, help="Number of prompts to compute together.")] = 16,
    pp: Stages = 1,
    tp: TensorRanks = 1,
    device: Annotated[Literal["auto", "cpu", "cuda"], typer.Option(help="Device to compute on.")] = "auto",
    trust_code: TrustCode = False,
    config: ModelConfigFile = None,
) -> None:
    """Generate text with a trained model."""
    from dataclasses import asdict
    from functools import partial

    from pipekit.config.stored_code import check_stored_code
    from pipekit.data.chat_template import ChatTemplate
    from pipekit.errors import ConfigError
    from pipekit.inference.answer import GenerationSettings, encode_prompts, read_message, write_lines, write_text
    from pipekit.inference.answer import chat as answer_messages
    from pipekit.inference.generator import Generator
    from pipekit.inference.load_model import open_model
    from pipekit.inference.prompts import Prompt, read_prompts

    given = [
        name
        for name, value in {"--prompt": prompt, "--prompts": prompts, "--chat": chat or None}.items()
        if value is not None
    ]
    if len(given) > 1:
        raise ConfigError(f"{' and '.join(given)}: give one of them")
    if system is not None and not chat:
        raise ConfigError("--system is the first message of a chat; add --chat, or write messages in a file of prompts")
    settings = GenerationSettings(
        max_new_tokens, temperature, top_k or None, None if top_p == 1 else top_p, stop or (), batch_size
    )
    listed = [Prompt(prompt or "")] if prompts is None else read_prompts(prompts)
    if config is not None:
        check_stored_code(config, trust_code=trust_code)
    stored = open_model(source, given=config, trust_code=trust_code)
    encoded = encode_prompts(stored, listed, seed=seed)
    if pp * tp > 1:
        from pipekit.launch.model_ranks import SpreadModel, run_on_ranks

        spread = SpreadModel(str(source), None if config is None else str(config), trust_code, pp, tp)
        spread.check(stored)
        if chat and stored.tokenizer_file is not None:
            ChatTemplate(stored.tokenizer_file)  # refuses a tokenizer without one
        task = {
            "prompts": [asdict(each) for each in encoded],
            "settings": asdict(settings),
            "as_lines": prompts is not None,
            "chat": {"system": system, "seed": seed} if chat else None,
        }
        run_on_ranks("pipekit.launch.generate_rank", "pipekit generate", spread, task, device=device, reads_stdin=chat)
        return
    generator = Generator.build(stored, device=device)
    if not generator.has_cache:
        sys.stderr.write(
            "note: a layer of this model has no key-value cache, so each token recomputes the whole text\n"
        )
    if chat:
        read = partial(read_message, sys.stdin, sys.stderr)
        answer_messages(generator, settings, system=system, seed=seed, read=read, write=_write)
    elif prompts is not None:
        write_lines(generator, encoded, settings, _write)
    else:
        _write(encoded[0].shown)
        write_text(generator, encoded[0], settings, _write)
        _write("\n")


def _write(text: str) -> None:
    from pipekit.errors import printable

    sys.stdout.write(printable(text) if sys.stdout.isatty() else text)
    sys.stdout.flush()
