"""Report of a tuning run: plain data, a table, and the best configuration."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

from pipekit.commands.tune_session import TuneSession
from pipekit.number_text import bytes_text, seconds_text
from pipekit.training.console import print_table
from pipekit.tune.candidates import Choice
from pipekit.tune.search import Search

_SHOWN = 12


def tune_report(session: TuneSession, search: Search, *, verdict: str) -> dict[str, Any]:
    """Predictions and measurements of the candidates as plain data, the measured ones first."""
    corrected, ruled_out, best = search.corrected_s(), search.ruled_out(), search.best
    order = [*search.results, *(i for i in range(len(session.choices)) if i not in search.results)]
    rows = []
    for index in order:
        choice, result = session.choices[index], search.results.get(index)
        measured_s = None if result is None else result.step_time_s
        if index == best:
            judged = "best"
        elif result is not None:
            judged = result.text if measured_s is None else "slower"
        elif index in ruled_out:
            judged = "needs as much memory as one that ran out"
        elif search.candidates[index].stands_in_for is not None:
            judged = "not run: only saves memory"
        else:
            judged = "not run"
        rows.append(
            {
                "candidate": str(choice.prediction.plan),
                "changes": dict(choice.changes),
                "planned_s": choice.prediction.step_time_s,
                "corrected_s": corrected[index],
                "measured_s": measured_s,
                "planned_bytes": choice.prediction.memory_bytes,
                "measured_bytes": None if result is None else result.peak_bytes,
                "failure": None if result is None else result.failure,
                "verdict": judged,
            }
        )
    return {
        "device": session.device,
        "num_devices": session.num_devices,
        "num_candidates": len(session.choices),
        "num_refused": session.num_refused,
        "num_runs": len(search.results),
        "verdict": verdict,
        "best": None if best is None else rows[order.index(best)],
        "candidates": rows,
    }


def show_report(report: Mapping[str, Any], console: Console) -> None:
    """Print the measured candidates and, up to 12 in all, the first of the others."""
    table = Table(box=None, padding=(0, 2), header_style="bold")
    for name in ("planned", "corrected", "measured", "memory"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("candidate", no_wrap=True)
    table.add_column("verdict")
    rows = report["candidates"]
    shown = rows[: max(_SHOWN, report["num_runs"])]
    for row in shown:
        measured = "" if row["measured_s"] is None else seconds_text(row["measured_s"])
        peak = row["measured_bytes"]
        table.add_row(
            seconds_text(row["planned_s"]),
            seconds_text(row["corrected_s"]) if report["num_runs"] else "",
            measured,
            bytes_text(row["planned_bytes"]) + ("" if peak is None else f", measured {bytes_text(peak)}"),
            row["candidate"],
            row["verdict"],
        )
    print_table(table, console)
    if len(rows) > len(shown):
        console.print(f"  and {len(rows) - len(shown)} more; --json lists all")
    refused = f"; rules of the configuration refuse {report['num_refused']} more" if report["num_refused"] else ""
    console.print(
        f"\n{report['num_runs']} of {report['num_candidates']} candidates were run on {report['num_devices']} x "
        f"{report['device']}{refused}"
    )
    console.print(report["verdict"])


def tuned_yaml(choice: Choice, *, measured_s: float, num_runs: int, num_candidates: int, num_devices: int) -> str:
    """Whole configuration of a candidate as YAML, under comments with the tuned keys and the times of a step."""
    lines = [
        "# pipekit tune found this configuration. It is the fastest of",
        f"# {num_runs} that were measured, of {num_candidates} candidates over {num_devices} devices.",
        f"# A step took {seconds_text(measured_s)}; the plan predicted {seconds_text(choice.prediction.step_time_s)}.",
        "# Tuned keys:",
        *(f"#   {key}: {str(value).lower()}" for key, value in choice.changes.items()),
    ]
    return "\n".join(lines) + "\n" + choice.config.to_yaml()
