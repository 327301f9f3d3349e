"""Tables of a plan on a terminal."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import groupby
from textwrap import shorten
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table

from pipekit.number_text import bytes_text, count_text, days_text, seconds_text
from pipekit.pages.plan_page import checkpointing_text
from pipekit.predictions.parallel_plan import ParallelPlan
from pipekit.predictions.report import read_plan
from pipekit.training.console import print_table

_WIDE = 110
_BAR = 9
_STARTS = 36
_FOLDED_RANKS = 3


def show_report(report: Mapping[str, Any], console: Console) -> None:
    """Print the tables of a plan: the run, its ranks, and the layouts that were compared."""
    is_narrow = console.width < _WIDE
    tables = [summary_table(report), ranks_table(report, is_narrow=is_narrow)]
    if "partitions" in report:
        tables.append(partitions_table(report["partitions"]))
    if "layouts" in report:
        tables.append(layouts_table(report["layouts"], is_narrow=is_narrow))
    for table in tables:
        console.print()
        print_table(table, console)
    console.print()
    if "layouts" in report:
        console.print(counts_text(report), highlight=False, markup=False)
        first = layout_yaml(read_plan(report["layout"]))
        console.print(f"\nthe fastest in YAML:\n\n{first}", highlight=False, markup=False)


def summary_table(report: Mapping[str, Any]) -> Table:
    """Summary of a run in a few rows."""
    layout, device = report["layout"], report["device"]
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold cyan", no_wrap=True)
    table.add_column()
    table.add_row("model", f"{report['parameters']:,} parameters")
    table.add_row("layout", str(read_plan(layout)))
    if "steps" in report:
        table.add_row("steps", f"{report['steps']:,}")
    number = layout["pp"] * layout["dp"] * layout["tp"]
    reserve_bytes = device["memory_bytes"] - device["usable_bytes"]
    reserved = f", of which {bytes_text(reserve_bytes)} are reserved" if reserve_bytes else ""
    table.add_row("devices", f"{number:,} x {device['name']} with {bytes_text(device['memory_bytes'])}{reserved}")
    table.add_row(
        "step",
        f"{seconds_text(report['step_time_s'])}: compute {seconds_text(report['compute_s'])}, of which "
        f"{100 * report['bubble_fraction']:.1f} % bubble; reduction {seconds_text(report['reduction_s'])}; update "
        f"{seconds_text(report['update_s'])}",
    )
    table.add_row(
        "speed", f"{report['tokens_per_s']:,.0f} tokens/s, {report['tflops_per_device']:,.3g} TFLOP/s on each device"
    )
    if "run" in report:
        table.add_row("run", run_text(report["run"]))
    most = max(rank["memory_bytes"]["total"] for rank in report["stages"])
    fits = "" if most <= device["usable_bytes"] else ", which does not fit"
    table.add_row("memory", f"{bytes_text(most)} on the fullest rank{fits}", style="red" if fits else None)
    for place, name in (("host", "host memory"), ("files", "files")):
        if num_bytes := max(rank["memory_bytes"][place] for rank in report["stages"]):
            table.add_row("offloaded", f"{bytes_text(num_bytes)} in {name} on the fullest rank")
    return table


def run_text(run: Mapping[str, float]) -> str:
    """Days, device hours and cost of a whole run.

    Example:
        >>> run_text({"tokens": 300_000_000_000, "days": 12.34, "device_hours": 303_350.6, "cost": 758_376.5})
        '300.0 B tokens in 12.3 days: 303,351 device hours, which cost 758,376'
    """
    cost = f", which cost {run['cost']:,.0f}" if "cost" in run else ""
    hours = f"{run['device_hours']:,.0f} device hours"
    return f"{count_text(run['tokens'])} tokens in {days_text(run['days'])}: {hours}{cost}"


def ranks_table(report: Mapping[str, Any], *, is_narrow: bool = False) -> Table:
    """Table with a row for each pipeline rank: its layers, computation and memory. A narrow one has no bars.

    Three or more consecutive ranks with the same number of layers and the same numbers share a row.
    """
    limit = report["device"]["usable_bytes"]
    table = _new_table(is_narrow=is_narrow)
    for name in ("rank", "layers", "parameters", "busy", "weights", "states", "activations", "memory"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("used", justify="right" if is_narrow else "left", no_wrap=True)
    rows = []
    for rank in report["stages"]:
        memory = rank["memory_bytes"]
        states = memory["gradients"] + memory["optimizer_states"] + memory["masters"]
        share = memory["total"] / limit
        bar = "" if is_narrow else "█" * min(_BAR, max(1, round(share * _BAR))) + " "
        colour = "red" if share > 1 else "yellow" if share > 0.9 else "green"
        number_of_layers = " + ".join(str(last - first + 1) for first, last, *_ in rank["layers"])
        numbers = (
            count_text(rank["parameters"]),
            seconds_text(rank["time_s"]),
            bytes_text(memory["weights"]),
            bytes_text(states),
            bytes_text(memory["activations"] + memory["logits"]),
            bytes_text(memory["total"]),
            f"[{colour}]{bar}[/]{100 * share:.0f} %",
        )
        rows.append((rank, number_of_layers, numbers))
    for (number_of_layers, numbers), alike in groupby(rows, key=lambda row: row[1:]):
        ranks = [rank for rank, *_ in alike]
        if len(ranks) < _FOLDED_RANKS:
            for rank in ranks:
                spans = (f"{first}-{last}" if last > first else f"{first}" for first, last, *_ in rank["layers"])
                table.add_row(str(rank["rank"]), " ".join(spans), *numbers)
        else:
            table.add_row(f"{ranks[0]['rank']}-{ranks[-1]['rank']}", f"{number_of_layers} each", *numbers)
    return table


def partitions_table(partitions: Sequence[Mapping[str, Any]]) -> Table:
    """Table with a row for each partition of the model, the most even first."""
    table = Table(box=None, padding=(0, 2), header_style="bold")
    table.add_column("partition", no_wrap=True)
    table.add_column("busiest / mean", justify="right", no_wrap=True)
    table.add_column("first layer of each stage", no_wrap=True)
    for other in partitions:
        starts = shorten(" ".join(map(str, other["boundaries"][:-1])), _STARTS, placeholder=" ...")
        table.add_row(other["method"], f"{other['imbalance']:.3f}", starts)
    return table


def layouts_table(layouts: Sequence[Mapping[str, Any]], *, is_narrow: bool = False) -> Table:
    """Table with a row for each layout, the fastest first. A narrow one has fewer columns."""
    table = _new_table(is_narrow=is_narrow, gap=2)
    left_out = {"step", "ZeRO"} if is_narrow else set()
    for name in ("", "tokens/s", "step", "bubble", "memory", "pp", "dp", "tp", "ZeRO"):
        if name not in left_out:
            table.add_column(name, justify="right", no_wrap=True)
    for name in ("schedule", "batches", "checkpointing"):
        table.add_column(name, no_wrap=True)
    for place, found in enumerate(layouts, start=1):
        layout = found["layout"]
        table.add_row(
            str(place),
            f"{found['tokens_per_s']:,.0f}",
            *([] if is_narrow else [seconds_text(found["step_time_s"])]),
            f"{100 * found['bubble_fraction']:.1f} %",
            bytes_text(found["memory_bytes"]),
            str(layout["pp"]),
            str(layout["dp"]),
            str(layout["tp"]),
            *([] if is_narrow else [str(layout["zero"])]),
            layout["schedule"],
            f"{layout['num_micro_batches']:,} of {layout['micro_batch_size']}",
            checkpointing_text(layout["activation_checkpointing"]),
        )
    return table


def _new_table(*, is_narrow: bool, gap: int = 4) -> Table:
    padding = (0, 1 if is_narrow else gap // 2)
    return Table(box=None, padding=padding, header_style="bold", pad_edge=not is_narrow, collapse_padding=is_narrow)


def layout_yaml(plan: ParallelPlan) -> str:
    """Sections of a configuration that select a layout.

    Example:
        >>> from pipekit.layout import Layout
        >>> print(layout_yaml(ParallelPlan(Layout(pp=2, dp=4, tp=1), 1, "zb-v", 2, 2, 8, None)))
        parallel: {pp: 2, dp: 4, tp: 1, zero: 1, schedule: zb-v, partition: flops}
        train: {micro_batch_size: 2, activation_checkpointing: false}
    """
    sections: dict[str, dict[str, Any]] = {}
    for key, value in {**plan.written(), "parallel.partition": "flops"}.items():
        section, _, name = key.partition(".")
        sections.setdefault(section, {})[name] = value
    return str(yaml.safe_dump(sections, default_flow_style=None, sort_keys=False, width=78)).strip()


def counts_text(report: Mapping[str, Any]) -> str:
    """Numbers of layouts that fit and of those that do not, by kind of reason, with an example of each."""
    num_fitting, num_open = report["num_fitting"], report["num_open"]
    lines = [
        "1 layout was simulated and fits" if num_fitting == 1 else f"{num_fitting:,} layouts were simulated and fit"
    ]
    if num_open:
        which = (
            "1 more is estimated to be slower and was"
            if num_open == 1
            else f"{num_open:,} more are estimated to be slower and were"
        )
        lines.append(f"{which} not simulated")
    kinds: Counter[str] = Counter()
    examples: dict[str, str] = {}
    for layout in report["rejected"]:
        kind = "do not fit in memory" if "lacking_bytes" in layout else "cannot be built"
        kinds[kind] += 1
        examples.setdefault(kind, f"{read_plan(layout['layout'])}, which {layout['reason']}")
    lines += [f"{number:,} {kind}, such as {examples[kind]}" for kind, number in kinds.most_common()]
    return "\n".join(lines)
