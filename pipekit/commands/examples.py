"""`pipekit examples`: examples that are installed with the package."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import Annotated, Protocol

import typer

from pipekit.errors import ConfigError
from pipekit.storage import storing


class _File(Protocol):
    """File of the package, which may not be on a disk."""

    def read_text(self, encoding: str) -> str: ...

    def read_bytes(self) -> bytes: ...


def command(
    name: Annotated[
        str | None, typer.Argument(help="Example to write; by default all are listed.", show_default=False)
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="File to write; by default the example's name.", show_default=False),
    ] = None,
) -> None:
    """List the examples, or write one of them to a file."""
    examples = _find_examples()
    if name is None:
        from pipekit.training.console import facts_table, make_console, print_table

        rows = [(own, _first_sentence(example.read_text(encoding="utf-8"))) for own, example in examples.items()]
        print_table(facts_table(*rows), make_console())
        return
    if name not in examples:
        from pipekit.settings.suggest import closest

        near = closest(name, examples)
        remedy = f"did you mean {near}?" if near else "pipekit examples lists them"
        raise ConfigError(f"{name}: no such example; {remedy}")
    path = out or Path(name)
    if path.exists():
        raise ConfigError(f"{path}: already exists; remove it, or give another name with -o")
    with storing(path):
        path.write_bytes(examples[name].read_bytes())
    typer.echo(f"wrote {path}")


def _find_examples() -> dict[str, _File]:
    """Files of the examples by name, configurations first."""
    found = [path for path in files("pipekit.examples").iterdir() if path.name.endswith((".yaml", ".py"))]
    found = [path for path in found if path.name != "__init__.py"]
    return {path.name: path for path in sorted(found, key=lambda path: (path.name.endswith(".py"), path.name))}


def _first_sentence(text: str) -> str:
    """Summary of an example: the beginning of its first comment or docstring, up to a full stop or a colon.

    Example:
        >>> _first_sentence('# Trains a model,\\n# a small one: try it.\\n\\nmodel: {}')
        'Trains a model, a small one'
        >>> _first_sentence('"''""A GAN.\\n\\nMore of it.\\n"''""')
        'A GAN'
    """
    block = text.strip('"# \n').split("\n\n")[0]
    line = " ".join(part.lstrip("# ") for part in block.splitlines())
    ends = [place for end in (". ", ": ", ":\n") if (place := line.find(end)) >= 0]
    return line[: min(ends)] if ends else line.rstrip('".:')
