"""`pipekit presets`: named sizes of the built-in model families."""

from __future__ import annotations

import typer


def command() -> None:
    """List the presets of the built-in families with their sizes.

    Select one with `model.preset`.
    """
    from rich.table import Table

    from pipekit.models import preset_families
    from pipekit.training.console import make_console, print_table

    table = Table(box=None, padding=(0, 1), header_style="bold", pad_edge=False)
    table.add_column("preset", no_wrap=True)
    table.add_column("family", no_wrap=True)
    for title in ("blocks", "width", "heads", "positions", "vocabulary"):
        table.add_column(title, justify="right", no_wrap=True)
    for name, family in preset_families().items():
        sizes = family.presets[name]
        shown = [sizes.get(key) for key in ("num_layers", "hidden_size", "num_heads", "max_positions", "vocab_size")]
        cells = ["" if size is None else f"{size:,}" if isinstance(size, int) else str(size) for size in shown]
        table.add_row(name, family.model_fields["family"].default, *cells)
    print_table(table, make_console())
    typer.echo("\n`auto` means the vocabulary size of the tokenizer")
