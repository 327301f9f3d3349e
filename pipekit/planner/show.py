"""A report as tables on a terminal."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

_GB = 1e9
_WIDTH = 16


def show_report(report: Mapping[str, Any], console: Console) -> None:
    """Print what `pipekit.planner.report.report` returns: the run, its ranks, and the layouts that were compared."""
    facts = Table.grid(padding=(0, 2))
    facts.add_column(style="bold cyan", no_wrap=True)
    facts.add_column()
    device = report["device"]
    facts.add_row("parameters", f"{report['parameters']:,}")
    facts.add_row("layout", layout_text(report["layout"]))
    facts.add_row("device", f"{device['name']}, {device['memory_bytes'] / _GB:,.1f} GB")
    facts.add_row(
        "step",
        f"{seconds_text(report['step_time_s'])}: compute {seconds_text(report['compute_s'])}, reduction "
        f"{seconds_text(report['reduction_s'])}, update {seconds_text(report['update_s'])}",
    )
    facts.add_row("bubble", f"{100 * report['bubble_fraction']:.1f} %")
    facts.add_row(
        "speed", f"{report['tokens_per_s']:,.0f} tokens/s, {report['tflops_per_device']:,.4g} TFLOP/s on each device"
    )
    console.print(facts, "", ranks_table(report), "")
    if "partitions" in report:
        console.print(partitions_table(report["partitions"]), "")
    if "layouts" in report:
        console.print(layouts_table(report["layouts"]), "")
        console.print(rejected_text(report["rejected"]), highlight=False)


def ranks_table(report: Mapping[str, Any]) -> Table:
    """Return a row for each pipeline rank: its layers, and what it computes and holds."""
    limit = report["device"]["memory_bytes"]
    table = Table(box=None, padding=(0, 2), header_style="bold")
    for name in ("rank", "layers", "parameters", "busy", "weights", "states", "activations", "memory"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("of the device", width=_WIDTH)
    for rank in report["stages"]:
        memory = rank["memory_bytes"]
        states = memory["gradients"] + memory["optimizer_states"] + memory["masters"]
        share = memory["total"] / limit
        bar = "█" * min(_WIDTH - 7, max(1, round(share * (_WIDTH - 7))))
        colour = "red" if share > 1 else "yellow" if share > 0.9 else "green"
        table.add_row(
            str(rank["rank"]),
            " ".join(f"{first}-{last}" if last > first else f"{first}" for first, last, *_ in rank["layers"]),
            f"{rank['parameters']:,}",
            seconds_text(rank["time_s"]),
            bytes_text(memory["weights"]),
            bytes_text(states),
            bytes_text(memory["activations"] + memory["logits"]),
            bytes_text(memory["total"]),
            f"[{colour}]{bar}[/] {100 * share:.0f} %",
        )
    return table


def partitions_table(partitions: Sequence[Mapping[str, Any]]) -> Table:
    """Return a row for each way to cut the model, the most even first."""
    table = Table(box=None, padding=(0, 2), header_style="bold")
    table.add_column("partition", no_wrap=True)
    table.add_column("busiest over mean", justify="right", no_wrap=True)
    table.add_column("stages begin with layer", overflow="ellipsis", no_wrap=True)
    for other in partitions:
        starts = " ".join(map(str, other["boundaries"][:-1]))
        table.add_row(other["method"], f"{other['imbalance']:.3f}", starts)
    return table


def layouts_table(layouts: Sequence[Mapping[str, Any]]) -> Table:
    """Return a row for each layout, the fastest first."""
    table = Table(box=None, padding=(0, 2), header_style="bold")
    for name in ("", "tokens/s", "step", "bubble", "memory"):
        table.add_column(name, justify="right")
    table.add_column("layout")
    for place, layout in enumerate(layouts, start=1):
        table.add_row(
            str(place),
            f"{layout['tokens_per_s']:,.0f}",
            seconds_text(layout["step_time_s"]),
            f"{100 * layout['bubble_fraction']:.1f} %",
            bytes_text(layout["memory_bytes"]),
            layout_text(layout["layout"]),
        )
    return table


def rejected_text(rejected: Sequence[Mapping[str, Any]]) -> str:
    """Return how many layouts cannot run, by the kind of reason, with an example of each."""
    kinds: Counter[str] = Counter()
    examples: dict[str, str] = {}
    for layout in rejected:
        kind = "needs more memory than the device has" if "GB" in layout["reason"] else "cannot be built"
        kinds[kind] += 1
        examples.setdefault(kind, f"{layout_text(layout['layout'])}: {layout['reason']}")
    lines = [f"{number:,} layouts rejected: {kind}, such as {examples[kind]}" for kind, number in kinds.most_common()]
    return "\n".join(lines)


def layout_text(layout: Mapping[str, Any]) -> str:
    """Return a layout on one line."""
    stages = f" x {layout['stages_per_rank']}" if layout["stages_per_rank"] > 1 else ""
    kept = ", checkpointing" if layout["activation_checkpointing"] else ""
    return (
        f"pp={layout['pp']} x dp={layout['dp']} x tp={layout['tp']}, ZeRO {layout['zero']}, "
        f"{layout['schedule']}{stages}, {layout['num_micro_batches']} x {layout['micro_batch_size']}{kept}"
    )


def bytes_text(number: float) -> str:
    """Return a number of bytes in decimal units.

    Example:
        >>> bytes_text(1_500_000), bytes_text(80e9)
        ('1.5 MB', '80.0 GB')
    """
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if number >= size:
            return f"{number / size:,.1f} {unit}"
    return f"{number / 1e3:,.1f} kB"


def seconds_text(seconds: float) -> str:
    """Return a time with three digits.

    Example:
        >>> seconds_text(0.0123), seconds_text(12.34)
        ('12.3 ms', '12.3 s')
    """
    return f"{seconds:,.3g} s" if seconds >= 1 else f"{1000 * seconds:,.3g} ms"
