"""Overhead of pipelines, measured: what an action costs beside its computation, with ours and with the peers.

    python benchmarks/overhead.py [--rounds N] [--json PATH]

Trains layers that multiply one number by one weight, on two ranks and on four, 32 micro-batches a step under 1F1B: with
DeepSpeed's `PipelineEngine`, with torch's `Schedule1F1B` and with ours, all in one run, which take turns. A step is 64
actions on each rank. Each figure is the median over the rounds. Prints a table and writes JSON.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from rich.table import Table

from pipelines.command import describe_machine, make_console, start_pool
from pipelines.jobs import run_setting
from pipelines.report import requirement_json, requirement_table
from pipelines.requirements import Requirement
from pipelines.settings import EmulatedSetting
from pipelines.turns import Contender, Results, of_system

NUM_MICRO_BATCHES = 32
SETTINGS = [EmulatedSetting(pp, NUM_MICRO_BATCHES, forward_s=0.0) for pp in (2, 4)]
WANTED = {"torch": 1.0, "DeepSpeed": 0.8}
"""Our time for an action over theirs, at most."""


def choose_contenders(setting: EmulatedSetting) -> list[Contender]:
    """Choose those that run 1F1B with one stage on each rank."""
    return [each for each in setting.contenders(["1f1b"]) if each.schedule.lower() == "1f1b"]


def action_us(results: Results) -> dict[str, float]:
    """Microseconds that each system takes for one of a rank's actions."""
    return {each.system: 1e6 * result.step_s / (2 * NUM_MICRO_BATCHES) for each, result in results.items()}


def check(setting: EmulatedSetting, results: Results) -> list[Requirement]:
    """Compare our time for an action with that of each peer."""
    ((_, ours),) = of_system(results, "pipekit").items()
    name = f"pp={setting.pp}, {setting.num_micro_batches} micro-batches"
    return [
        Requirement(name, f"time of an action over {each.system}'s", ours.step_s / result.step_s, WANTED[each.system],
                    at_least=False)
        for each, result in results.items()
        if each.system in WANTED
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=60, metavar="N", help="steps of each contender; %(default)s")
    parser.add_argument(
        "--json", type=Path, default=Path("overhead.json"), metavar="PATH", help="file to write; %(default)s"
    )
    arguments = parser.parse_args()
    console = make_console()
    table = Table(
        "", "ranks", "step", "an action", title=f"1F1B of {NUM_MICRO_BATCHES} micro-batches that cost nothing"
    )
    requirements: list[Requirement] = []
    report: dict[str, Any] = {"machine": describe_machine(), "rounds": arguments.rounds, "settings": []}
    with start_pool(console) as (pool, status):
        for setting in SETTINGS:
            status.update(f"pp={setting.pp}")
            results = run_setting(pool, setting, choose_contenders(setting), arguments.rounds)
            times_us = action_us(results)
            for contender, result in results.items():
                cells = f"{1e3 * result.step_s:.1f} ms", f"{times_us[contender.system]:.0f} us"
                table.add_row(contender.system, str(setting.pp), *cells)
            requirements += check(setting, results)
            report["settings"].append({"pp": setting.pp, "action_us": times_us})
    report["requirements"] = [requirement_json(requirement) for requirement in requirements]
    arguments.json.write_text(json.dumps(report, indent=1) + "\n")
    console.print(table)
    console.print(requirement_table(requirements))
    console.print(f"{arguments.json} has the figures", highlight=False)


if __name__ == "__main__":
    main()
