"""Verification on a terminal: a row for each layout, and the first difference of each that differs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from pipekit.number_text import seconds_text
from pipekit.training.console import facts_table, print_table
from pipekit.verify.explain import show_names
from pipekit.verify.layouts import show_degrees
from pipekit.verify.report import COLUMNS

_COLOURS = {"agrees": "green", "differs": "red", "failed": "red"}
_SHOWN_FAILURE_LINES = 12


def show_report(report: Mapping[str, Any], console: Console) -> None:
    """Print a report of `pipekit.verify.report`."""
    tables = [settings_table(report), layouts_table(report["layouts"])]
    tables += [fault_table(found) for found in report["layouts"] if found["verdict"] != "agrees"]
    if report["rejected"] or report["notes"]:
        tables.append(remarks_table(report))
    for table in tables:
        console.print()
        print_table(table, console)
    console.print()
    console.print(summary(report["layouts"]), style="bold green" if report["agrees"] else "bold red")


def settings_table(report: Mapping[str, Any]) -> Table:
    """Table of the model, the steps and the tolerance of a verification."""
    steps = "step" if report["steps"] == 1 else "steps"
    return facts_table(
        ("model", escape(report["model"])),
        (
            "compared",
            f"{report['steps']} {steps} of {report['global_batch_size']} sequences in fp32 on {report['device']}, with "
            "one process in plain torch",
        ),
        ("tolerance", f"{report['tolerance']:g}, relative to the norm of each tensor"),
    )


def layouts_table(layouts: Sequence[Mapping[str, Any]]) -> Table:
    """Table with a row for each layout and its largest relative differences."""
    table = Table(box=None, padding=(0, 2), header_style="bold")
    table.add_column("layout", no_wrap=True)
    for name in ("ZeRO", "processes", *COLUMNS, "time"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("verdict", no_wrap=True)
    for found in layouts:
        verdict = found["verdict"]
        cells = ["" if verdict == "failed" else _error_text(found[column]) for column in COLUMNS]
        if verdict == "differs":
            verdict += f" at {found['first_difference']['layer'] or found['first_difference']['kind']}"
        table.add_row(
            show_degrees(found["layout"]),
            str(found["layout"]["zero"]),
            str(found["processes"]),
            *cells,
            seconds_text(found["time_s"]),
            f"[{_COLOURS[found['verdict']]}]{escape(verdict)}[/]",
        )
    return table


def fault_table(found: Mapping[str, Any]) -> Table:
    """First difference of a layout: place, size and likely cause; or its failure."""
    name = show_degrees(found["layout"])
    if found["verdict"] == "failed":
        lines = [line for line in found["failure"].splitlines() if line.strip(" ~^")]
        shown = lines if len(lines) <= _SHOWN_FAILURE_LINES else [lines[0], "...", *lines[2 - _SHOWN_FAILURE_LINES :]]
        text = "\n".join(["failed:", *shown]) if len(shown) > 1 else f"failed: {shown[0]}"
        return facts_table((name, escape(text)), style="bold red")
    fault = found["first_difference"]
    facts = facts_table(
        (f"[red]{name}[/]", f"[red]differs first in {escape(fault['what'])}[/]"), ("  it is", escape(fault["by"]))
    )
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
    rejected = [f"{show_degrees(entry['layout'])}: {entry['reason']}" for entry in report["rejected"]]
    return facts_table(
        *(("" if place else "not run", escape(line)) for place, line in enumerate(rejected)),
        *(("" if place else "note", escape(line)) for place, line in enumerate(report["notes"])),
    )


def summary(layouts: Sequence[Mapping[str, Any]]) -> str:
    """Verdict on one line."""
    names: dict[str, list[str]] = {"agrees": [], "differs": [], "failed": []}
    for found in layouts:
        names[found["verdict"]].append(show_degrees(found["layout"]))
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


def _error_text(error: float | None) -> str:
    return "inf" if error is None else "0" if error == 0 else f"{error:.1e}"
