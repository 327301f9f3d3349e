"""A verification on a terminal: a row for each layout, and the first difference of each that differs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from pipekit.commands.number_text import seconds_text
from pipekit.training.console import print_table
from pipekit.verify.explain import show_names
from pipekit.verify.report import COLUMNS

_COLOURS = {"agrees": "green", "differs": "red", "failed": "red"}
_SHOWN_FAILURE_LINES = 12


def show_report(report: Mapping[str, Any], console: Console) -> None:
    """Print what `pipekit.verify.report.report` returns."""
    tables = [facts_table(report), layouts_table(report["layouts"])]
    tables += [fault_table(found) for found in report["layouts"] if found["verdict"] != "agrees"]
    if report["rejected"] or report["notes"]:
        tables.append(remarks_table(report))
    for table in tables:
        console.print()
        print_table(table, console)
    console.print()
    console.print(summary(report["layouts"]), style="bold green" if report["agrees"] else "bold red")


def facts_table(report: Mapping[str, Any]) -> Table:
    """Table of the model, the steps and the tolerance of a verification."""
    facts = Table.grid(padding=(0, 2))
    facts.add_column(style="bold cyan", no_wrap=True)
    facts.add_column()
    steps = "step" if report["steps"] == 1 else "steps"
    facts.add_row("model", escape(report["model"]))
    facts.add_row(
        "compared",
        f"{report['steps']} {steps} of {report['global_batch_size']} sequences in fp32 on {report['device']}, with one "
        "process that uses torch alone",
    )
    facts.add_row("tolerance", f"{report['tolerance']:g}, relative to the norm of each tensor")
    return facts


def layouts_table(layouts: Sequence[Mapping[str, Any]]) -> Table:
    """Return a row for each layout, with its largest relative differences."""
    table = Table(box=None, padding=(0, 2), header_style="bold")
    table.add_column("layout", no_wrap=True)
    for name in ("ZeRO", "processes", *COLUMNS, "time"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("verdict", no_wrap=True)
    for found in layouts:
        failed = found["verdict"] == "failed"
        cells = ["" if failed else _error_text(found[column]) for column in COLUMNS]
        verdict = found["verdict"]
        if verdict == "differs":
            verdict += f" at {found['first_difference']['layer'] or found['first_difference']['kind']}"
        table.add_row(
            layout_text(found["layout"]),
            str(found["layout"]["zero"]),
            str(found["processes"]),
            *cells,
            seconds_text(found["time_s"]),
            f"[{_COLOURS[found['verdict']]}]{escape(verdict)}[/]",
        )
    return table


def fault_table(found: Mapping[str, Any]) -> Table:
    """First difference of a layout: place, size and likely cause; or its failure."""
    facts = Table.grid(padding=(0, 2))
    facts.add_column(style="bold red" if found["verdict"] == "failed" else "bold cyan", no_wrap=True)
    facts.add_column()
    name = layout_text(found["layout"])
    if found["verdict"] == "failed":
        lines = [line for line in found["failure"].splitlines() if line.strip(" ~^")]
        shown = lines if len(lines) <= _SHOWN_FAILURE_LINES else [lines[0], "...", *lines[2 - _SHOWN_FAILURE_LINES :]]
        facts.add_row(name, escape("\n".join(["failed:", *shown] if len(shown) > 1 else [f"failed: {shown[0]}"])))
        return facts
    fault = found["first_difference"]
    facts.add_row(f"[red]{name}[/]", f"[red]differs first in {escape(fault['what'])}[/]")
    facts.add_row("  it is", escape(fault["by"]))
    if fault["where"]:
        facts.add_row("  on", fault["where"])
    if fault["agrees_before"]:
        facts.add_row("  before it", f"the same as in one process: {', '.join(fault['agrees_before'])}")
    if fault["other_layers"]:
        facts.add_row("  also in", escape(show_names(fault["other_layers"])))
    facts.add_row("  because", escape(fault["cause"]))
    return facts


def remarks_table(report: Mapping[str, Any]) -> Table:
    """Remarks: layouts that were not run, and notes on the result."""
    remarks = Table.grid(padding=(0, 2))
    remarks.add_column(style="bold cyan", no_wrap=True)
    remarks.add_column()
    for place, entry in enumerate(report["rejected"]):
        remarks.add_row("" if place else "not run", escape(f"{layout_text(entry['layout'])}: {entry['reason']}"))
    for place, note in enumerate(report["notes"]):
        remarks.add_row("" if place else "note", escape(note))
    return remarks


def summary(layouts: Sequence[Mapping[str, Any]]) -> str:
    """Return the verdict on one line."""
    names: dict[str, list[str]] = {"agrees": [], "differs": [], "failed": []}
    for found in layouts:
        names[found["verdict"]].append(layout_text(found["layout"]))
    same = "the same model as one process"
    if len(names["agrees"]) == len(layouts):
        return (
            f"{names['agrees'][0]} trains {same}" if len(layouts) == 1 else f"all {len(layouts)} layouts train {same}"
        )
    parts = []
    if names["differs"]:
        parts.append(f"{', '.join(names['differs'])} {'does' if len(names['differs']) == 1 else 'do'} not train {same}")
    if names["failed"]:
        parts.append(f"{', '.join(names['failed'])} failed")
    if names["agrees"]:
        parts.append(f"{', '.join(names['agrees'])} {'does' if len(names['agrees']) == 1 else 'do'}")
    return "; ".join(parts)


def layout_text(layout: Mapping[str, int]) -> str:
    """Return a layout by the degrees that are more than one.

    Example:
        >>> layout_text({"pp": 2, "dp": 1, "tp": 2, "zero": 1})
        'pp=2 x tp=2'
    """
    return " x ".join(f"{name}={layout[name]}" for name in ("pp", "dp", "tp") if layout[name] > 1) or "pp=1"


def _error_text(error: float | None) -> str:
    return "inf" if error is None else "0" if error == 0 else f"{error:.1e}"
