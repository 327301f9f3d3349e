"""Tables and histograms of `pipekit data inspect` on a console."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.bar import Bar
from rich.console import Console
from rich.table import Table
from rich.text import Text

from pipekit.number_text import count_text

_BAR_WIDTH = 32


def show_inspection(found: Mapping[str, Any], console: Console) -> None:
    """Print the sources, and the run if there is one."""
    for source in found["sources"]:
        console.print()
        console.print(Text(source["name"], "bold cyan"))
        console.print(_summary_table(source))
        if source["lengths"] is not None:
            console.print()
            console.print("Tokens in each training document:")
            console.print(_histogram_table(source["lengths"]["histogram"]))
        for sample in source["samples"]:
            console.print()
            console.print(Text(f"document {sample['document']:,}, {sample['num_tokens']:,} tokens", "bold"))
            more = sample["num_tokens"] - sample["num_shown"]
            rest = f"\n... and {more:,} more tokens" if more else ""
            console.print(Text(sample["text"] + rest))
    if found["run"] is not None:
        run = found["run"]
        console.print()
        names = {name: "the training text" if len(run["epochs"]) == 1 else name for name in run["epochs"]}
        epochs = ", ".join(f"{number:.3g} epochs of {names[name]}" for name, number in run["epochs"].items())
        console.print(Text(f"The run reads {run['num_tokens']:,} tokens ({run['text']}), {epochs}."))


def _summary_table(source: Mapping[str, Any]) -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, title in (("train", "training"), ("validation", "held out")):
        part = source[name]
        if part is not None:
            table.add_row(title, f"{part['num_documents']:,} documents, {part['num_tokens']:,} tokens")
            table.add_row("", str(part["path"]))
    lengths, duplicates = source["lengths"], source["duplicates"]
    if lengths is not None:
        table.add_row(
            "lengths",
            f"{lengths['shortest']:,} to {lengths['longest']:,} tokens; median {lengths['median']:,.0f}, mean "
            f"{lengths['mean']:,.0f}, 90 % at most {lengths['percentile_90']:,.0f}",
        )
    if duplicates["num_documents"]:
        table.add_row(
            "duplicates",
            f"{duplicates['num_documents']:,} training documents repeat an earlier one, with "
            f"{count_text(duplicates['num_tokens'])} tokens; document {duplicates['most_repeated_document']:,} occurs "
            f"{duplicates['most_repeated']:,} times",
        )
    else:
        table.add_row("duplicates", "none among the training documents")
    if duplicates["num_held_out_in_training"]:
        table.add_row(
            "", f"{duplicates['num_held_out_in_training']:,} held-out documents are also in the training data"
        )
    return table


def _histogram_table(histogram: list[Mapping[str, int]]) -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column(justify="right", no_wrap=True)
    table.add_column(width=_BAR_WIDTH)
    table.add_column(justify="right", no_wrap=True)
    most = max(bin["num_documents"] for bin in histogram)
    for bin in histogram:
        title = f"{bin['low']:,}" if bin["low"] == bin["high"] else f"{bin['low']:,} to {bin['high']:,}"
        table.add_row(title, Bar(most, 0, bin["num_documents"], width=_BAR_WIDTH), f"{bin['num_documents']:,}")
    return table
