"""`pipekit data`: prepare, inspect and convert the data of a run."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pipekit.commands.shared_options import AsJson, TrustCode

if TYPE_CHECKING:
    from pipekit.config import Config
    from pipekit.data.prepared import PreparedData, PreparedSource
    from pipekit.data.tokenizer import TextTokenizer
    from pipekit.progress import ProgressCallback

_ACTIONS = ("prepare", "inspect", "convert")
# Tokens of a sample that are shown.
_SHOWN_TOKENS = 64


def command(
    words: Annotated[
        list[str],
        typer.Argument(
            metavar="prepare|inspect|convert DATA [OUT] [KEY=VALUE]...",
            help="The action; the YAML file of a run, or a source of text or tokens; with convert, the file to write; "
            "keys to change, such as data.tokenizer=tokenizer.json.",
            show_default=False,
        ),
    ],
    samples: Annotated[int, typer.Option(min=0, help="With inspect: number of documents to show of each source.")] = 3,
    cores: Annotated[
        int | None,
        typer.Option(min=1, max=1024, help="Number of cores that tokenize text; all by default.", show_default=False),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="With convert: replace an existing file.")] = False,
    as_json: AsJson = False,
    trust_code: TrustCode = False,
) -> None:
    """Prepare, inspect or convert the data of a run.

    `prepare` tokenizes the text before the run, `inspect` shows statistics and samples, and `convert` writes the data
    to your own files.
    """
    from pipekit.data.convert import check_out
    from pipekit.errors import ConfigError
    from pipekit.training.console import make_console
    from pipekit.training.progress_bar import ProgressBar

    action, given = words[0], [word for word in words[1:] if "=" not in word]
    num_given = 2 if action == "convert" else 1
    if action not in _ACTIONS or len(given) != num_given:
        raise ConfigError(
            f"{' '.join(words)}: give prepare or inspect, and a YAML file or a source; or convert, one of these, and "
            "the file to write"
        )
    changes = [word for word in words[1:] if "=" in word]
    is_run = given[0].endswith((".yaml", ".yml"))
    if is_run:
        config = _load_run(given[0], changes, trust_code=trust_code)
    else:
        config = _source_config(given[0], changes, action)
    out = Path(given[1]) if action == "convert" else None
    if out is not None:
        check_out(out, overwrite=overwrite)
    with ProgressBar(make_console(sys.stderr)) as report:
        prepared = _prepare(config, cores, report, is_run=is_run)
        if out is not None:
            converted = _convert(config, prepared, out, report)
    if out is not None:
        written = ", ".join(f"{count:,} documents written to {file}" for file, count in converted.items())
        masks = ", with loss masks" if any(source.has_loss_mask for source in prepared.sources) else ""
        typer.echo(f"{written}{masks}; the tokenizer is {prepared.tokenizer_path}")
        return
    if action == "prepare":
        _show_prepared(prepared, as_json=as_json)
        return
    found = _inspect(config, prepared, samples, is_run=is_run)
    if as_json:
        sys.stdout.write(json.dumps(found, indent=1) + "\n")
        return
    from pipekit.commands.data_tables import show_inspection

    show_inspection(found, make_console())


def _load_run(path: str, changes: list[str], *, trust_code: bool) -> Config:
    from pipekit.config import load_config
    from pipekit.config.stored_code import check_stored_code

    check_stored_code(Path(path), changes, trust_code=trust_code)
    return load_config(path, changes)


def _source_config(source: str, changes: list[str], action: str) -> Config:
    """Configuration of a source without a run; by default, a conversion holds nothing out."""
    from pipekit.config import parse_config

    data: dict[str, Any] = {"source": source}
    if action == "convert":
        data["validation_fraction"] = 0.0
    return parse_config({"model": {"preset": "tiny"}, "train": {"steps": 1}, "data": data}, changes)


def _prepare(config: Config, cores: int | None, report: ProgressCallback, *, is_run: bool) -> PreparedData:
    """Prepare the data as the run does."""
    from pipekit.data.prepare import prepare_data
    from pipekit.errors import ConfigError
    from pipekit.training.language_model import LanguageModelTrial
    from pipekit.training.prepare import load_trial

    if not issubclass(load_trial(config), LanguageModelTrial):
        raise ConfigError(f"run.trial={config.run.trial}: prepares its own data, not those of a `data` section")
    return prepare_data(
        config.data,
        sequence_length=config.train.sequence_length if is_run else 1,
        timeout_s=config.run.timeout_s,
        on_progress=report,
        num_cores=cores,
    )


def _convert(config: Config, prepared: PreparedData, out: Path, report: ProgressCallback) -> dict[Path, int]:
    from pipekit.data.convert import convert_tokens
    from pipekit.data.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(prepared.tokenizer_path)
    return convert_tokens(prepared.sources, tokenizer, out, text_key=config.data.text_key, report=report)


def _show_prepared(prepared: PreparedData, *, as_json: bool) -> None:
    if as_json:
        sys.stdout.write(prepared.model_dump_json(indent=1) + "\n")
        return
    for source in prepared.sources:
        train, held_out = source.train, source.validation
        typer.echo(f"{source.name}: {train.num_documents:,} documents, {train.num_tokens:,} tokens in {train.path}")
        if held_out is not None:
            typer.echo(f"  held out: {held_out.num_documents:,} documents, {held_out.num_tokens:,} tokens")
    typer.echo(f"tokenizer of {prepared.vocab_size:,} tokens: {prepared.tokenizer_path}")


def _inspect(config: Config, prepared: PreparedData, num_samples: int, *, is_run: bool) -> dict[str, Any]:
    from pipekit.data.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(prepared.tokenizer_path)
    return {
        "vocab_size": prepared.vocab_size,
        "tokenizer": str(prepared.tokenizer_path),
        "sources": [_inspect_source(source, tokenizer, num_samples) for source in prepared.sources],
        "run": _inspect_run(config, prepared) if is_run else None,
    }


def _inspect_run(config: Config, prepared: PreparedData) -> dict[str, Any]:
    from pipekit.config.growth import describe_batch, tokens_of_steps
    from pipekit.training.language_model import LanguageModelTrial, count_epochs

    if not config.train.has_steps:
        config = LanguageModelTrial.resolve(config, prepared.model_dump(mode="json"))
    steps = config.train.steps
    return {
        "num_tokens": tokens_of_steps(config.train, steps),
        "text": f"{steps:,} steps of {describe_batch(config.train)}",
        "epochs": count_epochs(config, prepared),
    }


def _inspect_source(source: PreparedSource, tokenizer: TextTokenizer, num_samples: int) -> dict[str, Any]:
    from pipekit.data.statistics import find_duplicates, measure_lengths, take_excerpts

    lengths = measure_lengths(source.train)
    return {
        "name": source.name,
        "train": source.train.model_dump(mode="json"),
        "validation": None if source.validation is None else source.validation.model_dump(mode="json"),
        "lengths": None if lengths is None else lengths.model_dump(),
        "duplicates": find_duplicates(source.train, source.validation).model_dump(),
        "samples": [
            {
                "document": excerpt.document,
                "num_tokens": excerpt.num_tokens,
                "num_shown": len(excerpt.token_ids),
                "token_ids": list(excerpt.token_ids),
                "text": tokenizer.decode(excerpt.token_ids, skip_special_tokens=False),
            }
            for excerpt in take_excerpts(source.train, num_samples, _SHOWN_TOKENS)
        ],
    }
